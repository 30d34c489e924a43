"""Messages and descriptors between the master and one worker.

Theory of operation
    A channel is one end of an AF_UNIX SOCK_SEQPACKET pair made before the fork.  A message is a
    JSON object with its kind under "is"; one longer than a packet travels in parts.  Descriptors
    ride on the last part of their message.  Both ends run the same program version, so a
    malformed packet is a bug of ours and ends the channel, which ends the worker; so does one
    whose descriptors the receiver has no room for.

    The worker's end blocks: a worker has nothing better to do than to be heard.  The master's
    end never blocks: what a slow or stopped worker does not take waits in _waiting, and the
    master's loop calls flush() when the socket can be written again.

Threads
    send() may be called by any thread of the worker; _send_lock keeps parts together.
    receive() belongs to the thread of the loop.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import resource
import socket
import threading

from Zorp.Log import log

_PART_BYTES = 60_000         # well below the smallest send buffer that Linux gives a socket
_MAX_DESCRIPTORS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One message: its kind, its fields, and descriptors that now belong to the receiver."""

    kind: str
    fields: dict
    descriptors: list[int]

    def __getitem__(self, name: str):
        return self.fields[name]

    def get(self, name: str, default=None):
        return self.fields.get(name, default)


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel:
    """One end of the pair; see the module's text for who may call what."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._waiting: collections.deque[tuple[bytes, tuple[int, ...]]] = collections.deque()
        self._parts: list[bytes] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def send(self, kind: str, /, *, descriptors: tuple[int, ...] = (), **fields) -> None:
        """Send or queue one message.  Raises ChannelClosed when the other end is gone."""
        text = json.dumps({"is": kind, **fields}).encode()
        cuts = range(0, len(text), _PART_BYTES)
        parts = [(b"+" if cut + _PART_BYTES < len(text) else b".") + text[cut:cut + _PART_BYTES] for cut in cuts]
        with self._send_lock:
            for part in parts[:-1]:
                self._waiting.append((part, ()))
            self._waiting.append((parts[-1], tuple(os.dup(one) for one in descriptors)))
            self._flush_unlocked()

    def flush(self) -> bool:
        """Send what waits; True when nothing waits any more."""
        with self._send_lock:
            return self._flush_unlocked()

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def _flush_unlocked(self) -> bool:
        while self._waiting:
            part, descriptors = self._waiting[0]
            try:
                if descriptors:
                    socket.send_fds(self._sock, [part], list(descriptors))
                else:
                    self._sock.send(part)
            except BlockingIOError:
                return False
            except OSError as problem:
                raise ChannelClosed(str(problem)) from problem
            self._waiting.popleft()
            for one in descriptors:
                os.close(one)
        return True

    def receive(self) -> Message | None:
        """Return the next message; None when none is complete yet (non-blocking end only).

        Raises ChannelClosed at the end of the stream, after all that the other end said.
        """
        while True:
            try:
                part, descriptors, flags, _sender = socket.recv_fds(self._sock, _PART_BYTES + 1, _MAX_DESCRIPTORS)
            except BlockingIOError:
                return None
            except ConnectionResetError:             # it has closed without reading all; what it said is still there
                continue
            except OSError as problem:
                raise ChannelClosed(str(problem)) from problem
            if flags & socket.MSG_CTRUNC:
                self._lose(descriptors)
            for one in descriptors:
                os.set_inheritable(one, False)       # recv_fds() forgets its flags before Python 3.13
            if not part:
                raise ChannelClosed("the other end has closed the channel")
            self._parts.append(part[1:])
            if part[:1] == b".":
                fields = json.loads(b"".join(self._parts))
                self._parts = []
                return Message(fields.pop("is"), fields, descriptors)

    @staticmethod
    def _lose(descriptors: list[int]) -> None:
        """Some of a message's descriptors found no room: without them it would mean something else."""
        for one in descriptors:
            os.close(one)
        log(None, "core.error", 1, "No room for a descriptor from another process of the instance; limit='%d'",
            (resource.getrlimit(resource.RLIMIT_NOFILE)[0],))
        raise ChannelClosed("descriptors were lost")

    def close(self) -> None:
        """Close this end; queued descriptors too.  Idempotent."""
        with self._send_lock:
            for _part, descriptors in self._waiting:
                for one in descriptors:
                    os.close(one)
            self._waiting.clear()
            self._sock.close()


def pair() -> tuple[Channel, Channel]:
    """Return the master's end, which does not block, and the worker's end, which does."""
    master_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    master_end.setblocking(False)
    return Channel(master_end), Channel(worker_end)
