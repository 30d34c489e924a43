"""What policy code and child processes print, as log lines (logging 8).

With the system log in use, descriptors 1 and 2 of a worker become the write end of a pipe, and
its loop logs every line that comes out: core.stderr(3), session id `stderr`.  A line without
end is logged in pieces of LINE_BYTES.  The pipe is never full for long: the loop does nothing
that waits, and it reads before it sleeps.
"""

from __future__ import annotations

import os
import sys

from Zorp.Log import log

LINE_BYTES = 4096


class CapturedOutput:
    """The read end; for the loop of the worker."""

    def __init__(self) -> None:
        """Put the pipe in the place of standard output and error."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        for descriptor in (1, 2):
            os.dup2(write_end, descriptor)
        os.close(write_end)
        self._rest = b""

    def fileno(self) -> int:
        return self._read_end

    def read(self) -> bool:
        """Log what there is; False when nobody can write any more."""
        try:
            data = os.read(self._read_end, 65_536)
        except BlockingIOError:
            return True
        except OSError as problem:
            log("stderr", "core.stderr", 3, "Can not read from stderr; result='%s'", (problem.strerror,))
            return True
        if not data:
            log("stderr", "core.stderr", 4, "The program closed its stderr. No further stderr logging is possible.")
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > LINE_BYTES:
            lines.append(self._rest[:LINE_BYTES])
            self._rest = self._rest[LINE_BYTES:]
        for line in lines:
            log("stderr", "core.stderr", 3, "%s", (line,))
        return True
