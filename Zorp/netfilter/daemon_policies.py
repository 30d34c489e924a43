"""Reads the policies of all instances for kzorpd, beside its loop.

Theory of operation
    read() starts the children of Zorp.netfilter.policies one after the other, the next when one
    has ended, because loading is work for a processor and there are few.  Each has a deadline.
    When the last has ended the caller gets everything at once.  A read() while one is under way
    begins anew after it, however it ended: what the files say now is what the second caller
    wants.  Callers that wait for the same thing share one reading.
"""

from __future__ import annotations

import selectors
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from Zorp.Log import log, log_exception
from Zorp.netfilter.policies import DESCRIBE_DEADLINE_S, Child, PolicyUnusable, read_instances
from Zorp.process.timers import Timer, Timers
from Zorp.rules.description import InstanceDescription
from Zorp.wire.instances_conf import InstanceLine


@dataclass
class Policies:
    """What was read: descriptions in upload order, and why others are missing.

    unread holds the names of those others, and "" for lines of instances.conf that name nobody;
    known all names that instances.conf has, None when it cannot be opened; unread is what it was
    before then.
    """

    descriptions: dict[str, InstanceDescription] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    known: frozenset[str] | None = None

    def miss(self, instance: str, problem: str) -> None:
        """Note why an instance has no description."""
        self.unread.add(instance)
        self.problems.append(problem)


Done = Callable[[Policies], None]


@dataclass
class _Job:
    """One reading: of all instances, or of one."""

    only: str | None
    done: list[Done]


class PolicyReader:
    """One reading at a time; the loop's."""

    def __init__(self, config_dir: str, selector: selectors.BaseSelector, timers: Timers,
                 command: tuple[str, ...] | None = None) -> None:
        self._config_dir = config_dir
        self._selector = selector
        self._timers = timers
        self._command = command
        self._waiting: deque[_Job] = deque()
        self._job: _Job | None = None                    # under way
        self._lines: deque[InstanceLine] = deque()
        self._child: Child | None = None
        self._deadline: Timer | None = None
        self._unread: frozenset[str] = frozenset()       # as the last reading of all instances had it

    def read(self, done: Done, only: str | None = None) -> None:
        """Read every policy, or that of one instance; call done() when that has ended."""
        job = next((job for job in self._waiting if job.only == only), None)
        if job is None:
            job = _Job(only, [])
            self._waiting.append(job)
        job.done.append(done)
        if self._job is None:
            self._begin()

    def _begin(self) -> None:
        self._job = self._waiting.popleft()
        self._found = Policies()
        try:
            instances = read_instances(self._config_dir)
        except OSError as problem:
            log(None, "core.info", 1, "Unable to open instances.conf, falling back to configuration dir; error='%s', "
                "fallback='%s'", (problem, self._config_dir))
            self._found.problems.append(f"{problem.filename or 'instances.conf'} cannot be read, packet rules stay as "
                                        f"they are; error='{problem.strerror or problem}'")
            self._found.unread |= self._unread
            self._end()
            return
        except Exception as problem:                 # a defect must not leave every later reading undone
            self._found.miss("", f"{type(problem).__name__}: {problem}")
            self._end()
            return
        for problem in instances.problems:
            self._found.miss("", problem)
        if not instances.lines:
            log(None, "core.info", 1, "No instances defined; instances_conf='%s'", (instances.path,))
        self._found.known = frozenset(line.name for line in instances.lines)
        self._lines = deque(line for line in instances.lines if self._job.only in (None, line.name))
        self._next()

    def _next(self) -> None:
        while self._lines and self._child is None:
            line = self._lines.popleft()
            try:
                self._child = Child(line, self._command)
            except Exception as problem:
                self._miss(line.name, problem)
                continue
            self._selector.register(self._child.descriptor, selectors.EVENT_READ, lambda events: self._ended())
            self._deadline = self._timers.after(DESCRIBE_DEADLINE_S, self._too_long)
        if self._child is None:
            self._end()

    def _too_long(self) -> None:
        self._found.miss(self._child.instance, f"instance '{self._child.instance}': loading took longer than "
                                               f"{DESCRIBE_DEADLINE_S:.0f} seconds")
        self._let_go()
        self._next()

    def _ended(self) -> None:
        try:
            description = self._child.result()
            self._found.descriptions[description.instance] = description
        except Exception as problem:
            self._miss(self._child.instance, problem)
        self._let_go()
        self._next()

    def _miss(self, instance: str, problem: Exception) -> None:
        """Note why an instance has no description; a defect counts as one reason more, and the reading goes on."""
        text = str(problem) if isinstance(problem, PolicyUnusable) else f"{type(problem).__name__}: {problem}"
        self._found.miss(instance, text)

    def _let_go(self) -> None:
        self._deadline.cancel()
        self._selector.unregister(self._child.descriptor)
        self._child.close()
        self._child = None

    def _end(self) -> None:
        job, self._job = self._job, None
        if job.only is None:
            self._unread = frozenset(self._found.unread)
        for done in job.done:
            try:
                done(self._found)
            except Exception as problem:             # the others wait, too
                log(None, "core.error", 1, "Unexpected error; error='%s'", (problem,))
                log_exception(None)
        if self._waiting and self._job is None:
            self._begin()

    def close(self) -> None:
        """Give up what is under way; nobody is called any more."""
        self._waiting.clear()
        if self._child is not None:
            self._let_go()
