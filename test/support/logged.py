"""What this process logs, for tests that run the package themselves.

    with captured_log() as logged:
        ...
        logged.wait_for("Ending proxy instance")
    assert logged.has("Attribute cannot be read; config='%d', name='%s'", (1, "x"))

log() is replaced wherever a module of the package holds it, and put back afterwards; every level
counts as enabled meanwhile.  Not for several tests in one process at the same time.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from typing import NamedTuple

import pytest

DEADLINE_S = 10.0

_LOUDEST = 10                    # everything counts as enabled


class Message(NamedTuple):
    """One call of log()."""

    session: str | None
    tag: str
    level: int
    template: str
    arguments: tuple

    @property
    def text(self):
        """The message as it would be written."""
        return self.template % self.arguments if self.arguments else self.template


class Logged:
    """The messages of one test; _arrived guards _messages and tells waiters of new ones."""

    def __init__(self):
        self._messages = []
        self._arrived = threading.Condition()

    def add(self, session, tag, level, template, arguments):
        """Called instead of log(), by any thread."""
        if arguments is None:
            arguments = ()
        elif not isinstance(arguments, tuple):
            arguments = (arguments,)
        # formatted here, as log() does: arguments change after the call
        message = Message(session, tag, level, template, tuple(map(_frozen, arguments)))
        with self._arrived:
            self._messages.append(message)
            self._arrived.notify_all()

    @property
    def messages(self):
        """Everything so far, oldest first."""
        with self._arrived:
            return list(self._messages)

    def texts(self, tag=None):
        """Return the texts so far, of one tag or of all."""
        return [message.text for message in self.messages if tag in (None, message.tag)]

    def find(self, text):
        """Return the messages whose text begins so."""
        return [message for message in self.messages if message.text.startswith(text)]

    def has(self, template, arguments):
        """True when this template was logged with these arguments."""
        return any(message.template == template and message.arguments == arguments for message in self.messages)

    def wait_for(self, text, count=1, timeout_s=DEADLINE_S):
        """Return the count-th message that begins so, as soon as it is there."""
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while True:
                found = [message for message in self._messages if message.text.startswith(text)]
                if len(found) >= count:
                    return found[count - 1]
                if not self._arrived.wait(deadline - time.monotonic()):
                    break
        pytest.fail(f"not logged within {timeout_s} s: {text!r}; but:\n" + "\n".join(self.texts()))
        return None


def _frozen(value):
    if isinstance(value, (bytes, bytearray)):
        return value.decode("latin-1")               # as log() writes it
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


@contextlib.contextmanager
def captured_log():
    """Yield a Logged that gets every message of the package."""
    logged = Logged()
    log_module = importlib.import_module("Zorp.Log")
    real = {name: getattr(log_module, name) for name in ("log", "enabled")}

    def log(sessionid, logclass, verbosity, msg=None, args=None):
        if msg is None:
            sessionid, logclass, verbosity, msg = None, sessionid, logclass, verbosity
        logged.add(sessionid, logclass, verbosity, msg, args)

    fake = {"log": log, "enabled": lambda tag, level: True}
    loudest = log_module.loudest
    _replace(real, fake)
    log_module.loudest = _LOUDEST
    try:
        yield logged
    finally:
        _replace(fake, real)
        log_module.loudest = loudest


def _replace(old, new):
    """Put new functions where modules of the package hold the old ones."""
    for name, module in list(sys.modules.items()):
        if name.startswith("Zorp."):
            for attribute, value in list(vars(module).items()):
                for which, function in old.items():
                    if value is function:
                        setattr(module, attribute, new[which])
