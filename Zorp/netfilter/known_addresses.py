"""The addresses of host names as kzorpd knew them last, in a file of the state directory.

Theory of operation
    A rule that refuses a host name must refuse it, too, when kzorpd or the host comes back while
    name servers are away.  A file that somebody else can have written (Zorp.netfilter.own_files),
    or that makes no sense, is treated as absent and reported.  A name without answers has no
    address: what is permitted by it is not,
    and what rules refuse by it is named when they are loaded (Zorp.rules.by_name).

kzorpd writes it; kzorp-setup reads it, too, for the time before kzorpd runs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping

from Zorp.Log import log
from Zorp.netfilter.own_files import opened

FILE_NAME = "host-names.json"
MAX_BYTES = 64 << 20


class KnownAddresses:
    """The file in a directory."""

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, FILE_NAME)
        self._written: dict[str, list[str]] | None = None

    def read(self) -> dict[str, list[str]]:
        """Return name -> addresses as texts; nothing when there is no file that can be used."""
        try:
            with open(opened(self._path, os.O_RDONLY), "rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES} bytes")
                value = json.loads(file.read(MAX_BYTES))
            if not isinstance(value, dict) or not all(map(_is_list_of_texts, value.values())):
                raise ValueError("not addresses by name")
            return value
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as problem:
            log(None, "core.error", 1, "Addresses of host names cannot be read, starting without them; "
                "file='%s', error='%s'", (self._path, problem))
            return {}

    def write(self, addresses: Mapping[str, Iterable[str]]) -> None:
        """Keep these; a failure is reported, and what was kept before stays."""
        value = {name: list(texts) for name, texts in addresses.items()}
        if value == self._written:
            return
        beside = self._path + ".new"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            descriptor = opened(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(value, file, separators=(",", ":"))
                file.flush()
                os.fsync(descriptor)
            os.replace(beside, self._path)
            self._written = value
        except OSError as problem:
            log(None, "core.error", 1, "Addresses of host names cannot be kept; file='%s', error='%s'",
                (self._path, problem.strerror))


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
