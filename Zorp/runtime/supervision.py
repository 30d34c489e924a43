"""When a crashed worker is started again, and who is told.

Theory of operation
    RestartBudget counts starts within a sliding interval: the first one and those after a crash,
    so with the default of 5 the fifth start inside 60 seconds is the last.  Workers of a reload
    replace nobody who failed and are not counted.  FailureHook runs the site's
    executable at most once per notify interval, detached, with the arguments of the original.
    Reporter writes what the supervisor of the original wrote: `NAME: text` on standard error
    while that is attached, afterwards syslog daemon.crit with the ident `supervise/NAME`.  Where
    the log is, its lines have the form of the log (JSON, RFC 5424), too.  A reader of standard
    error that is slow or gone does not concern it (Zorp.process.logsinks).

    What is decided here is carried out by Zorp.runtime.master.
"""

from __future__ import annotations

import collections
import os
import subprocess
import time
from collections.abc import Callable

from Zorp.Log import log
from Zorp.process.logsinks import SyslogSink
from Zorp.runtime.logsetup import LogSetup
from Zorp.runtime.options import Options


class RestartBudget:
    """How many starts the interval still allows; one per virtual process."""

    def __init__(self, most: int, interval_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._interval_s = interval_s
        self._clock = clock
        self._starts: collections.deque[float] = collections.deque()

    def started(self) -> None:
        """Count a start."""
        self._starts.append(self._clock())

    def take_back(self) -> None:
        """The latest start did not come to be."""
        if self._starts:
            self._starts.pop()

    @property
    def count(self) -> int:
        """Starts within the interval."""
        while self._starts and self._starts[0] <= self._clock() - self._interval_s:
            self._starts.popleft()
        return len(self._starts)

    @property
    def exhausted(self) -> bool:
        """True when the process must not be started again."""
        return self.count >= self._most


class Reporter:
    """The supervisor's own messages."""

    def __init__(self, name: str, log_setup: LogSetup) -> None:
        self._name = name
        self._stderr = log_setup.stderr
        self._syslog = log_setup.sink if isinstance(log_setup.sink, SyslogSink) else None   # can take over
        self._formatter = log_setup.formatter
        self.attached = True             # standard error still belongs to whoever started us

    def __call__(self, text: str) -> None:
        if self._syslog is None:
            line = self._formatter.supervisor_line(self._name, text)
        elif self.attached:
            line = f"{self._name}: {text}"       # for whoever started us; the log is elsewhere
        else:
            packet = self._formatter.supervisor_packet(self._name, text)
            self._syslog.packet(packet.encode("utf-8", "backslashreplace"))
            return
        self._stderr.packet(f"{line}\n".encode("utf-8", "backslashreplace"))


class FailureHook:
    """Runs the site's executable when a worker failed."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._path = options.failure_hook
        self._clock = clock
        self._last_s: float | None = None
        self._suppressed = 0

    def run(self, process_name: str, pid_file: str, reason: str, detail: int | None, restarting: bool) -> bool:
        """Start it unless it ran within the notify interval or does not exist; True when started.

        reason: "deadlock detected", "signalled" or "non-zero exit code"; detail: signal or status.
        """
        if not os.access(self._path, os.X_OK):
            return False
        now = self._clock()
        if self._last_s is not None and now < self._last_s + self._options.notify_interval:
            self._suppressed += 1
            return False
        suppressed, self._suppressed = self._suppressed, 0
        self._last_s = now
        options = self._options
        details = "" if detail is None else f"{detail}; supressed_notifications={suppressed}"
        arguments = [process_name, options.chroot, os.path.dirname(pid_file), pid_file, _working_directory(),
                     None if options.no_caps else options.caps, reason, details,
                     "restarting" if restarting else "not-restarting"]
        # The shell leaves its child behind at once: the hook is nobody's business afterwards.
        try:
            subprocess.run(["/bin/sh", "-c", '"$@" </dev/null >/dev/null 2>&1 &', "sh", self._path,
                            *("(null)" if argument is None else argument for argument in arguments)], check=False)
        except OSError as problem:
            log(None, "core.error", 1, "Cannot run the failure hook; hook='%s', error='%s'",
                (self._path, problem.strerror))
            return False
        return True


def _working_directory() -> str | None:
    """Where we are; None when that has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return None
