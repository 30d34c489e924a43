"""How often a fast sender wakes the relay: seldomer, as network drivers moderate their interrupts.

Theory of operation
    poll() tells of a readable socket from its first byte on.  Where a sender is as fast as the
    relay, that wakes three processes all the time, for a fraction of what a pipe takes at once.
    With a low-water mark on the socket (SO_RCVLOWAT) the kernel tells when it is worth it.

    The end of a burst stays below the mark, though, and nothing tells of it unless the connection
    ends as well.  So a mark is raised only where it pays, and whoever polls does not wait for it
    beyond `due_s`.  Each direction of a relay has a Moderation of its own, in one of two states:

        proving     the mark is 1, `due_s` infinite.  When so many bytes (PROOF_BYTES at first) were
                    carried at FAST or above, the mark is raised; otherwise the proof begins anew
        moderated   `due_s` is PATIENCE_S after the last bytes.  Who finds it passed calls lower():
                    poll() tells of every byte again, at once of those that are there, and the
                    direction proves itself anew; with twice as many bytes, unless the mark had
                    carried PAYS times the proof

    So a long burst waits for PATIENCE_S once, at its end.  Bursts that are too short to be worth
    that are soon shorter than the proof, and never wait again; nor does a sender that stays below
    FAST, at which the mark is reached in half the patience.

    The end of file, a reset and a full receive buffer are told of below the mark, too; the kernel
    enlarges the buffer for the mark, or lowers the mark where it may not.  An urgent byte waits
    like the rest.  A socket that has no mark is asked once; one that ignores it, as local ones do,
    loses nothing.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable

from Zorp.transport.pipes import PIPE_BYTES

MARK_BYTES = PIPE_BYTES          # half of it gains nothing, one and a half less
PATIENCE_S = 0.002
FAST = 2 * MARK_BYTES / PATIENCE_S       # bytes per second: 8.4 Gbit/s
PROOF_BYTES = 4 << 20
PAYS = 16                        # times the proof: then PATIENCE_S is little beside the time all that took
_NO_MARK = 1


class Moderation:
    """The low-water mark of the socket that one direction of a relay reads; for one thread."""

    __slots__ = ("_began_at", "_began_s", "_clock", "_proof_bytes", "_sock", "_total", "due_s")

    def __init__(self, sock: socket.socket, clock: Callable[[], float] = time.monotonic) -> None:
        self._sock = sock
        self._clock = clock
        self._proof_bytes: float = PROOF_BYTES
        self._total = 0
        self._begin()

    def carried(self, total: int) -> None:
        """Take note that so many bytes were moved altogether, and that the next are waited for from now on."""
        self._total = total
        if self.due_s < math.inf:
            self.due_s = self._clock() + PATIENCE_S
        elif total - self._began_at >= self._proof_bytes:
            self._judge()

    def lower(self) -> None:
        """Have poll() tell of every byte, until the direction has proved fast anew."""
        if self.due_s < math.inf:
            self._set_mark(_NO_MARK)
            paid = self._total - self._began_at >= PAYS * self._proof_bytes
            self._proof_bytes = PROOF_BYTES if paid else 2 * self._proof_bytes
            self._begin()

    def _begin(self) -> None:
        self.due_s = math.inf
        self._began_at = self._total
        self._began_s = self._clock()

    def _judge(self) -> None:
        """Raise the mark if the proof was passed, let another one begin otherwise."""
        was_fast = self._total - self._began_at >= FAST * (self._clock() - self._began_s)
        self._begin()
        if was_fast:
            if self._set_mark(MARK_BYTES):
                self.due_s = self._began_s + PATIENCE_S
            else:
                self._proof_bytes = math.inf

    def _set_mark(self, count: int) -> bool:
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        except OSError:
            return False
        return True
