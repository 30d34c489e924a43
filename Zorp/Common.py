"""Logging for tools beside the daemon, in the daemon's line shape; and log() itself.

    NAME[pid]: class(level): (session): text

Theory of operation
    `log` is the daemon's.  Tools use LoggerSingleton: init() chooses between the system log
    (facility user) and standard error, log() formats and filters.  A log specification is a
    list of items `class.kind:level` separated by commas, each part may be `*`; a message is
    written when any item lets it through.  The last item is always `*.*:verbosity`.

    Control characters in a message are escaped, so that a peer's bytes cannot make a line.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
import threading

from Zorp.Constants import (
    CORE_ALERTING,
    CORE_AUTH,
    CORE_DEBUG,
    CORE_ERROR,
    CORE_INFO,
    CORE_MESSAGE,
    CORE_POLICY,
    CORE_SESSION,
    CORE_SUMMARY,
    TLS_ACCOUNTING,
)
from Zorp.Log import log

_ITEM = re.compile(r"([a-z0-9]+|\*)\.([a-z0-9]+|\*):([0-9]{1,2})", re.ASCII)
_HIGHEST_LEVEL = 10
_SYSTEM_LOG = "/dev/log"
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)}

__all__ = [
    "CORE_ALERTING", "CORE_AUTH", "CORE_DEBUG", "CORE_ERROR", "CORE_INFO", "CORE_MESSAGE", "CORE_POLICY",
    "CORE_SESSION", "CORE_SUMMARY", "TLS_ACCOUNTING",
    "LogFilter", "LogSpecItem", "Logger", "LoggerSingleton", "Singleton", "log",
]


class Singleton(type):
    """A class of this type has one instance, made by the first call."""

    _instances_lock = threading.RLock()         # guards _instances
    _instances = {}

    def __call__(cls, *args, **kwargs):
        with Singleton._instances_lock:
            if cls not in Singleton._instances:
                Singleton._instances[cls] = super().__call__(*args, **kwargs)
            return Singleton._instances[cls]


class LogSpecItem:
    """One item, `class.kind:level`, level 0 to 10; raises ValueError for any other text."""

    def __init__(self, logspec_item):
        parsed = _ITEM.fullmatch(logspec_item.strip())
        if parsed is None or int(parsed[3]) > _HIGHEST_LEVEL:
            raise ValueError(f"Invalid log specification item; item='{logspec_item}'")
        self._class, self._kind, self._level = parsed[1], parsed[2], int(parsed[3])

    def is_log_enabled(self, log_tag, log_verbosity):
        """Return whether this item lets the message through."""
        log_class, _, kind = log_tag.partition(".")
        return (self._class in ("*", log_class) and self._kind in ("*", kind) and log_verbosity <= self._level)


class LogFilter:
    """Decides by tag and level; usable as a filter of the logging package."""

    logspec_pattern = re.compile(r": (([a-z]+|\*)\.([a-z]+|\*))\(\d\): ")
    _message_pattern = re.compile(r"(?:^|: )([a-z0-9]+\.[a-z0-9]+)\(([0-9]+)\): ", re.ASCII)

    def __init__(self, verbosity, logspec):
        self._items = [LogSpecItem(item) for item in logspec.split(",") if item.strip()]
        self.verbosity = verbosity

    @property
    def verbosity(self):
        """The level up to which every message is written."""
        return self._verbosity

    @verbosity.setter
    def verbosity(self, verbosity):
        self._verbosity = verbosity
        self._all = LogSpecItem(f"*.*:{verbosity}")

    def is_log_enabled(self, log_tag, log_verbosity):
        """Return whether any item lets the message through."""
        return any(item.is_log_enabled(log_tag, log_verbosity) for item in (*self._items, self._all))

    def filter(self, record):
        """Return whether a record of the logging package is written; one without tag and level is."""
        found = self._message_pattern.search(record.getMessage())
        return found is None or self.is_log_enabled(found[1], int(found[2]))


class Logger:
    """The log of a tool; call init() before log()."""

    def __init__(self):
        self._logger = None
        self._name = ""
        self._filter = LogFilter(3, "")
        self._use_syslog = False

    def init(self, name, verbosity=3, logspec="", use_syslog=True):
        """Begin: `name` stands at the head of each line; raises ValueError for a bad specification."""
        self._name = name
        self._filter = LogFilter(verbosity, logspec)
        self._logger = logging.getLogger(f"zorp-tool.{name}")
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        self.use_syslog = use_syslog

    @property
    def use_syslog(self):
        """True: lines go to the system log; False: to standard error."""
        return self._use_syslog

    @use_syslog.setter
    def use_syslog(self, use_syslog):
        self._use_syslog = use_syslog
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            handler.close()
        handler = _syslog_handler() if use_syslog else None
        if handler is None:
            handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"{self._name}[{os.getpid()}]: %(message)s"))
        self._logger.addHandler(handler)

    @property
    def verbosity(self):
        """The level up to which every message is written."""
        return self._filter.verbosity

    @verbosity.setter
    def verbosity(self, verbosity):
        self._filter.verbosity = verbosity

    def format_log(self, sessionid, logclass, verbosity, fmt, args=None):
        """Return `class(level): (session): text` without control characters."""
        text = fmt if args is None else fmt % args
        return f"{logclass}({verbosity}): ({sessionid or 'nosession'}): {text}".translate(_ESCAPES)

    def log(self, sessionid, logclass, verbosity, fmt, args=None):
        """Write a message that the specification lets through."""
        if self._filter.is_log_enabled(logclass, verbosity):
            self._logger.info("%s", self.format_log(sessionid, logclass, verbosity, fmt, args))


def _syslog_handler():
    """Return a handler for the system log, None on a host without one."""
    try:
        return logging.handlers.SysLogHandler(_SYSTEM_LOG, logging.handlers.SysLogHandler.LOG_USER)
    except OSError:
        return None


class LoggerSingleton(Logger, metaclass=Singleton):
    """The one log of a tool."""
