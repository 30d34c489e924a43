"""Set up the log of a process as the command line asks."""

from __future__ import annotations

import time

from Zorp import Log
from Zorp.process.logsinks import Formatter, StderrSink, SyslogSink, Throttle
from Zorp.runtime.options import Options

_DRAIN_S = 1.0
_DRAIN_PAUSE_S = 0.01


class LogSetup:
    """The sinks of this process and what belongs to them.

    `sink` gets the log, in the form of `formatter`.  `stderr` is for what is said to whoever started
    us, the same object when the log goes there: neither ever waits for who reads it, or ends with
    who does not.
    """

    def __init__(self, options: Options) -> None:
        """Install sink, spec and verbosity.  Raises Zorp.Log.BadLogSpec."""
        self.formatter = formatter = Formatter(options.log_format, options.instance, severity=options.log_severity)
        self.stderr = StderrSink(formatter)
        self.sink = SyslogSink(formatter, options.log_socket) if options.syslog else self.stderr
        self.throttle = Throttle(options.log_rate) if options.log_rate else None
        Log.configure(sink=self.sink, throttle=self.throttle, escape_high=options.log_escape,
                      secrets=options.log_secrets, structured=options.log_format != "classic")
        Log.set_filter(Log.Filter(options.verbosity, options.log_spec))

    def after_fork(self) -> None:
        """Give this process a connection and lines of its own."""
        self.stderr.forget()
        if isinstance(self.sink, SyslogSink):
            self.sink.forget()
            self.sink.reopen()

    @property
    def waiting(self) -> bool:
        """True while flush() has something to do."""
        return self.sink.waiting or self.stderr.waiting

    def flush(self) -> None:
        """Write what can be written now."""
        for sink in (self.sink, self.stderr):
            if sink.waiting:
                sink.flush()

    def drain(self) -> None:
        """Last chance for lines that wait; the process is about to end."""
        deadline = time.monotonic() + _DRAIN_S
        self.flush()
        while self.waiting and time.monotonic() < deadline:
            time.sleep(_DRAIN_PAUSE_S)
            self.flush()

    def tick(self) -> None:
        """Report what was held back; called every few seconds."""
        held = self.throttle.take_held() if self.throttle is not None else 0
        if held:
            self.sink("core.error", 1, "nosession", f"Log messages suppressed; count='{held}'")


def change_verbosity(level: int) -> int:
    """Set the verbosity, 0 to 10; log the change if it is one; return the level in force."""
    level = min(max(level, 0), 10)
    present = Log.current_filter()
    if level != present.verbosity:
        Log.set_filter(Log.Filter(level, present.spec))
        Log.log(None, "core.info", 0, "Changing verbosity level; verbose_level='%d'", (level,))
    return level


def change_spec(spec: str) -> bool:
    """Set the log spec; False, and the old one stays, when it cannot be read."""
    present = Log.current_filter()
    try:
        Log.set_filter(Log.Filter(present.verbosity, spec))
    except Log.BadLogSpec:
        Log.log(None, "core.error", 0, "Invalid logspec, reverting to old logspec; new_logspec='%s'", (spec,))
        return False
    Log.log(None, "core.info", 0, "Changing logspec; verbose_level='%d', logspec='%s'", (present.verbosity, spec))
    warn_about_shadowed_items()
    missing = Log.unrecorded(spec)
    if missing:
        Log.log(None, "core.error", 0,
                "Log spec leaves records of sessions to the verbosity; missing='%s', verbose_level='%d'",
                (",".join(missing), present.verbosity))
    return True


def warn_about_shadowed_items() -> None:
    """Say which items of the log spec can never decide: the first match wins."""
    for item in Log.current_filter().shadowed_items():
        Log.log(None, "core.error", 2, "Log spec item is shadowed by an earlier one; item='%s'", (item,))
