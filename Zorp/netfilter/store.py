"""What the packet filter of this host holds for Zorp: kept over restarts, one writer at a time.

Theory of operation
    The state is the descriptions in force, in upload order, and the indexes of their rules
    (without which connections that live now would be taken for others after a restart).  It is
    one file in the state directory, written beside and renamed, so a reader finds the old state
    or the new one.  It is written before the kernel is changed and renamed after that: a full
    disk leaves the kernel as it was.

    A writer may die at any point, and a load may fail half-way.  So before the kernel is changed
    the old state is written once more with the indexes that are about to be used, which nobody
    gets a second time then, and as not settled: connections may live that the rules in force
    would not let begin.  It stays so until somebody has decided about these connections
    (Zorp.netfilter.sessions) and says so with write().

    Who changes packet rules holds the lock from before it reads the state until after it has
    written it; the kernel frees the lock of a process that dies.

    A file that makes no sense is treated as absent and reported: the policies can be read again,
    and rules are compiled from them.  Only the stability of indexes is lost.

    What is read here decides about packets, so a file counts only if nobody but user 0, or our own
    user, can have written it (Zorp.netfilter.own_files); only so much is read, and without waiting.
    What is written goes to a file made anew.

The lock is between processes.  Inside kzorpd only the main thread writes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from Zorp.Log import log
from Zorp.netfilter.caution import closed
from Zorp.netfilter.compiler import IndexState
from Zorp.netfilter.own_files import locked, opened, prepare_directory
from Zorp.rules.description import InstanceDescription, from_json, to_json

FILE_NAME = "packet-rules.json"
LOCK_NAME = "packet-rules.lock"
LOCK_DEADLINE_S = 30.0
MAX_BYTES = 64 << 20             # of the file
_VERSION = 1


class StoreError(Exception):
    """The state cannot be locked, read or written; `str()` is for the administrator."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The part of one instance."""

    description: InstanceDescription
    handed_over: bool = False        # by the running instance itself, not read from its policy file
    is_stranger: bool = False        # no longer in instances.conf: its rules take what they took, and nothing passes


@dataclass(frozen=True, slots=True)
class State:
    """What is in force."""

    entries: tuple[Entry, ...] = ()                  # in upload order
    indexes: IndexState = field(default_factory=IndexState)
    is_settled: bool = False         # all forwarded connections were decided about under these rules

    @property
    def descriptions(self) -> tuple[InstanceDescription, ...]:
        """What the entries come to."""
        return tuple(closed(entry.description) if entry.is_stranger else entry.description for entry in self.entries)

    def entry(self, instance: str) -> Entry | None:
        """Return the part of an instance; None when it has none."""
        return next((entry for entry in self.entries if entry.description.instance == instance), None)

    def with_entry(self, entry: Entry) -> State:
        """Return the state with this part of an instance: in its old place, or as the last."""
        name = entry.description.instance
        if self.entry(name) is not None:
            entries = tuple(entry if known.description.instance == name else known for known in self.entries)
        else:
            entries = (*self.entries, entry)
        return State(entries, self.indexes)

    def before_a_change(self, after: State) -> State:
        """Return this state as it has to be on disk while the kernel gets another one."""
        return State(self.entries, self.indexes.reserving(after.indexes))

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
            prepare_directory(os.path.dirname(self._lock_path))
            descriptor = opened(self._lock_path, os.O_RDWR | os.O_CREAT)
        except OSError as problem:
            raise StoreError(f"Cannot lock the state of the packet rules; file='{self._lock_path}', "
                             f"error='{problem.strerror}'") from None
        try:
            if not locked(descriptor, deadline_s):
                raise StoreError("Another program is changing the packet rules and does not end; "
                                 f"lock='{self._lock_path}'")
            yield
        finally:
            os.close(descriptor)

    def read(self) -> State:
        """Return the state; an empty one when there is none that can be used."""
        try:
            value = json.loads(self._text(), parse_constant=_no_number)
            if value["version"] != _VERSION:
                raise ValueError(f"version {value['version']!r}")
            entries = tuple(Entry(from_json(json.dumps(part["description"])), part["handed_over"] is True,
                                  part.get("stranger") is True)
                            for part in value["instances"])
            return State(entries, IndexState.from_json(json.dumps(value["indexes"])), value.get("settled") is True)
        except FileNotFoundError:
            return State()
        except Exception as problem:             # whatever is in a file of theirs, the host's start goes on
            log(None, "core.error", 1, "State of the packet rules cannot be read, starting without it; "
                "file='%s', error='%s'", (self._path, problem))
            return State()

    def _text(self) -> bytes:
        """Return what the file holds, at once; raises OSError, and StoreError for what cannot be ours."""
        with open(opened(self._path, os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise StoreError(f"{size} bytes, at most {MAX_BYTES} are read")
            return file.read(MAX_BYTES)

    @contextlib.contextmanager
    def replacing(self, before: State, state: State) -> Iterator[None]:
        """Make `state` the state when the `with` block ends without an exception, in which the kernel is changed.

        Otherwise `before` stays, unsettled.  What can fail for want of room or rights fails before
        the block.  Raises StoreError.
        """
        self.write(before.before_a_change(state))
        self._prepare(state)
        yield
        self._take_over()

    def write(self, state: State) -> None:
        """Make this the state.  Raises StoreError; the old state stays then."""
        self._prepare(state)
        self._take_over()

    def _prepare(self, state: State) -> None:
        value = {"version": _VERSION, "settled": state.is_settled, "indexes": json.loads(state.indexes.to_json()),
                 "instances": [
            {"handed_over": entry.handed_over, "stranger": entry.is_stranger,
             "description": json.loads(to_json(entry.description))}
            for entry in state.entries]}
        text = json.dumps(value, separators=(",", ":")).encode()
        if len(text) > MAX_BYTES:
            raise StoreError(f"The state of the packet rules has more than {MAX_BYTES} bytes; file='{self._path}'")
        with self._errors():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path + ".new")
            descriptor = opened(self._path + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with open(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def _take_over(self) -> None:
        with self._errors():
            os.replace(self._path + ".new", self._path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise StoreError(f"Cannot write the state of the packet rules; file='{self._path}', "
                             f"error='{problem.strerror}'") from None


def _no_number(name: str) -> None:
    raise StoreError(f"{name} is no number of ours")
