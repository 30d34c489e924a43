"""What the packet filter of this host holds for Zorp: kept over restarts, one writer at a time.

Theory of operation
    The state is the descriptions in force, in upload order, and the indexes of their rules
    (without which connections that live now would be taken for others after a restart).  It is
    one file in the state directory, written beside and renamed, so a reader finds the old state
    or the new one.  It is written before the kernel is changed and renamed after that: a full
    disk leaves the kernel as it was.  Who changes packet rules holds the lock from before it
    reads the state until after it has written it; the kernel frees the lock of a process that dies.

    A file that makes no sense is treated as absent and reported: the policies can be read again,
    and rules are compiled from them.  Only the stability of indexes is lost.

The lock is between processes.  Inside kzorpd only the main thread writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from Zorp.Log import log
from Zorp.netfilter.compiler import IndexState
from Zorp.rules.description import DescriptionError, InstanceDescription, from_json, to_json

FILE_NAME = "packet-rules.json"
LOCK_NAME = "packet-rules.lock"
LOCK_DEADLINE_S = 30.0
_VERSION = 1
_MODE = 0o640
_POLL_S = 0.02


class StoreError(Exception):
    """The state cannot be locked or written; `str()` is for the administrator."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The part of one instance."""

    description: InstanceDescription
    handed_over: bool = False        # by the running instance itself, not read from its policy file


@dataclass(frozen=True, slots=True)
class State:
    """What is in force."""

    entries: tuple[Entry, ...] = ()                  # in upload order
    indexes: IndexState = field(default_factory=IndexState)

    @property
    def descriptions(self) -> tuple[InstanceDescription, ...]:
        return tuple(entry.description for entry in self.entries)

    def with_entry(self, entry: Entry) -> State:
        """Return the state with this part of an instance: in its old place, or as the last."""
        name = entry.description.instance
        if any(known.description.instance == name for known in self.entries):
            entries = tuple(entry if known.description.instance == name else known for known in self.entries)
        else:
            entries = (*self.entries, entry)
        return State(entries, self.indexes)

    def without(self, instance: str) -> State:
        """Return the state without the part of an instance."""
        return State(tuple(entry for entry in self.entries if entry.description.instance != instance), self.indexes)


class Store:
    """The state in a directory."""

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, FILE_NAME)
        self._lock_path = os.path.join(state_dir, LOCK_NAME)

    @contextlib.contextmanager
    def lock(self, deadline_s: float = LOCK_DEADLINE_S) -> Iterator[None]:
        """Be the only writer in a `with` block.  Raises StoreError when another one does not end in time."""
        try:
            os.makedirs(os.path.dirname(self._lock_path), exist_ok=True)
            descriptor = self._open(self._lock_path, os.O_RDWR)
        except OSError as problem:
            raise StoreError(f"Cannot lock the state of the packet rules; file='{self._lock_path}', "
                             f"error='{problem.strerror}'") from None
        try:
            self._take(descriptor, time.monotonic() + deadline_s)
            yield
        finally:
            os.close(descriptor)

    @staticmethod
    def _open(path: str, flags: int) -> int:
        """Open a file of ours; what user 0 makes belongs to the owner of the directory, who may be kzorpd's user."""
        descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
        if os.geteuid() == 0:
            owner = os.stat(os.path.dirname(path))
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor

    def _take(self, descriptor: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError("Another program is changing the packet rules and does not end; "
                                     f"lock='{self._lock_path}'") from None
                time.sleep(_POLL_S)

    def read(self) -> State:
        """Return the state; an empty one when there is none that can be used."""
        try:
            with open(self._path, encoding="utf-8") as file:
                value = json.load(file)
            if value["version"] != _VERSION:
                raise ValueError(f"version {value['version']!r}")
            entries = tuple(Entry(from_json(json.dumps(part["description"])), bool(part["handed_over"]))
                            for part in value["instances"])
            return State(entries, IndexState.from_json(json.dumps(value["indexes"])))
        except FileNotFoundError:
            return State()
        except (OSError, ValueError, TypeError, KeyError, RecursionError, DescriptionError) as problem:
            log(None, "core.error", 1, "State of the packet rules cannot be read, starting without it; "
                "file='%s', error='%s'", (self._path, problem))
            return State()

    @contextlib.contextmanager
    def replacing(self, state: State) -> Iterator[None]:
        """Make this the state when the `with` block ends without an exception, in which the kernel is changed.

        What can fail for want of room or rights fails before the block.  Raises StoreError; the old
        state stays then.
        """
        value = {"version": _VERSION, "indexes": json.loads(state.indexes.to_json()), "instances": [
            {"handed_over": entry.handed_over, "description": json.loads(to_json(entry.description))}
            for entry in state.entries]}
        with self._errors():
            descriptor = self._open(self._path + ".new", os.O_WRONLY | os.O_TRUNC)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(value, file, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
        yield
        with self._errors():
            os.replace(self._path + ".new", self._path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise StoreError(f"Cannot write the state of the packet rules; file='{self._path}', "
                             f"error='{problem.strerror}'") from None
