"""Signals as something a loop can wait for.

Handlers do nothing; the interpreter writes each signal's number into a non-blocking pipe, and
the loop reads the numbers when it has time.  So a signal can never interrupt the loop in the
middle of a step, and none is lost while a step takes long: two arrivals of one number before
the loop looks are one, as with plain signals.
"""

from __future__ import annotations

import os
import signal


class SignalPipe:
    """Catches the given signals for the loop of this process; main thread only."""

    def __init__(self, numbers: tuple[signal.Signals, ...]) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        self._numbers = numbers

    def fileno(self) -> int:
        return self._read_end

    def arrived(self) -> list[signal.Signals]:
        """Return the signals that came since the last call, each once, in the order they were asked for."""
        seen = set()
        try:
            while data := os.read(self._read_end, 512):
                seen.update(data)
        except BlockingIOError:
            pass
        return [number for number in self._numbers if number in seen]

    def close(self) -> None:
        """Give the signals back to their default actions, as a forked child needs."""
        signal.set_wakeup_fd(-1)
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)
        os.close(self._read_end)
        os.close(self._write_end)
