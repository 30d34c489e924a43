"""The policies of this host, as descriptions: each loaded by a child that has no rights.

Theory of operation
    instances.conf names the instances and the options of their daemons.  For each, the program
    zorp is started with these options and --describe: it drops its privileges, loads the policy
    and prints the description as JSON.  What comes back is not believed but checked
    (Zorp.rules.description), and must be about the instance that was asked for.

    A Child is one such program.  Its output goes to files in memory whose size is limited, so
    a child that writes without end dies of it; `descriptor` becomes readable when it has
    ended.  describe() runs children and waits; kzorpd watches the descriptors in its loop.

    Where memory runs out the kernel ends a child first: its policy is what takes the memory, and
    who started it has packet rules to load.

The child's session is its own: a terminal's ^C does not reach it, kill() ends all of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from Zorp.netfilter.children import command_of
from Zorp.rules.description import MAX_BYTES, DescriptionError, InstanceDescription, from_json
from Zorp.wire import instances_conf, zorpctl_conf
from Zorp.wire.instances_conf import InstanceLine

DESCRIBE_DEADLINE_S = 60.0
_COMPLAINT_BYTES = 65_536
_SHOWN_ERRORS = 3
_OOM_SCORE_ADJ = 800             # of 1000
_ERROR = re.compile(r"\w{3} \d\d [\d:]{8} core\.error\(\d+\): (?:\(nosession\): )?")
_PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "sbin", "zorp")
_MODULE = "Zorp.runtime.main"         # where there is no tree of ours, but an installed package


class PolicyUnusable(Exception):
    """The description of an instance cannot be had; `str()` is for the administrator."""


@dataclass(frozen=True, slots=True)
class HostInstances:
    """What instances.conf says; `problems` are lines that were left out."""

    path: str
    lines: tuple[InstanceLine, ...]
    problems: tuple[str, ...] = ()


def read_instances(config_dir: str) -> HostInstances:
    """Return the instances of a configuration directory, in upload order; raises OSError when there is no file."""
    conf = zorpctl_conf.ZorpctlConf()
    with contextlib.suppress(FileNotFoundError), \
            open(os.path.join(config_dir, "zorpctl.conf"), encoding="utf-8", errors="replace") as file:
        conf = zorpctl_conf.parse(file.read())
    path = os.path.join(config_dir, "instances.conf")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines, problems = instances_conf.parse(file.read(), conf)
    return HostInstances(path, tuple(lines), tuple(map(str, problems)))


class Child:
    """One `zorp --describe`, running or ended.  Close it."""

    def __init__(self, line: InstanceLine, command: Iterable[str] | None = None) -> None:
        """Start it.  Raises PolicyUnusable."""
        self.instance = line.name
        self._place = f"instances.conf:{line.line_number}"
        words = [*(command or zorp_command()), *line.zorp_words, "--describe", "--no-syslog"]
        try:
            with contextlib.ExitStack() as undoing:
                self._output, self._complaints = (_memory(name, undoing) for name in ("description", "complaints"))
                self._program = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._complaints,
                    start_new_session=True, cwd="/")
                undoing.callback(self._end)
                self.descriptor = os.pidfd_open(self._program.pid)
                undoing.pop_all()
        except (OSError, ValueError) as problem:     # ValueError: a word that no program can be given
            raise PolicyUnusable(f"{words[0]}: {getattr(problem, 'strerror', problem)}") from None
        with contextlib.suppress(OSError):           # it has ended already
            resource.prlimit(self._program.pid, resource.RLIMIT_FSIZE, (MAX_BYTES + 1, MAX_BYTES + 1))
        with contextlib.suppress(OSError), open(f"/proc/{self._program.pid}/oom_score_adj", "w") as file:
            file.write(str(_OOM_SCORE_ADJ))

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._program.pid, signal.SIGKILL)

    def _end(self) -> None:
        self.kill()
        self._program.wait()

    def result(self) -> InstanceDescription:
        """Return the description once it has ended; raises PolicyUnusable."""
        status = self._program.wait()
        if status:
            raise PolicyUnusable(f"instance '{self.instance}': {self._complaint() or f'exit status {status}'}")
        try:
            description = from_json(os.pread(self._output, MAX_BYTES + 1, 0))
        except DescriptionError as problem:
            raise PolicyUnusable(str(problem)) from None
        if description.instance != self.instance:
            raise PolicyUnusable(
                f"{self._place}: instance '{self.instance}': the description is of '{description.instance}'; "
                "install one version of zorp and kzorp-setup, they disagree about names")
        return description

    def _complaint(self) -> str:
        """The errors of the log, without date and category."""
        lines = os.pread(self._complaints, _COMPLAINT_BYTES, 0).decode("utf-8", "replace").splitlines()
        errors = [_ERROR.sub("", line) for line in lines if _ERROR.match(line) and "Traceback: " not in line]
        return "; ".join(errors[:_SHOWN_ERRORS]) or "".join(lines[-1:])

    def close(self) -> None:
        """Let go of everything; kills what still runs."""
        if self._program.poll() is None:
            self._end()
        for descriptor in (self._output, self._complaints, self.descriptor):
            os.close(descriptor)


def _memory(name: str, undoing: contextlib.ExitStack) -> int:
    """Return the descriptor of a file in memory, which `undoing` closes."""
    descriptor = os.memfd_create(name)
    undoing.callback(os.close, descriptor)
    return descriptor


def zorp_command() -> list[str]:
    """Return how the program zorp is started: that of our own tree, else the one that is installed."""
    return [sys.executable, _PROGRAM] if os.path.exists(_PROGRAM) else command_of(_MODULE)


def describe(lines: Iterable[InstanceLine], deadline_s: float = DESCRIBE_DEADLINE_S,
             command: Iterable[str] | None = None) -> dict[str, InstanceDescription | PolicyUnusable]:
    """Return by instance, in order, its description or why there is none; one child at a time."""
    return {line.name: _describe_one(line, deadline_s, command) for line in lines}


def _describe_one(line: InstanceLine, deadline_s: float,
                  command: Iterable[str] | None) -> InstanceDescription | PolicyUnusable:
    try:
        child = Child(line, command)
    except PolicyUnusable as problem:
        return problem
    try:
        if not _wait(child.descriptor, time.monotonic() + deadline_s):
            return PolicyUnusable(f"instance '{line.name}': loading took longer than {deadline_s:.0f} seconds")
        return child.result()
    except PolicyUnusable as problem:
        return problem
    finally:
        child.close()


def _wait(descriptor: int, deadline: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(max(deadline - time.monotonic(), 0)))
