"""Results: one line per process, successes on stdout, failures and warnings on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Result:
    """What a command did to a process."""

    process_name: str
    text: str
    ok: bool = True
    warning: bool = False        # on stderr, but nothing has failed

    def __str__(self) -> str:
        return f"{self.process_name}: {self.text}" if self.process_name else self.text


def failed(process_name: str, text: str) -> Result:
    """Return the result of something that did not work."""
    return Result(process_name, text, ok=False)


def show(results: Iterable[Result]) -> int:
    """Print the results as they come; return the exit status."""
    status = EXIT_OK
    for result in results:
        print(result, file=sys.stdout if result.ok and not result.warning else sys.stderr, flush=True)
        if not result.ok:
            status = EXIT_FAILED
    return status
