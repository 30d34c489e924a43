"""Run config() of every proxy class of a policy before the first client does: for zorp --check-policy.

Theory of operation
    The proxy class of each service is made with a stand-in for a session, over a pair of sockets,
    and taken through its config events and the engine's own check.  What fails for every client
    is a complaint: a name that nobody defines, a value that an attribute refuses, a matcher that
    does not exist; and so is what cannot be meant (Zorp.engine.config_lint), such as a table entry
    that is no action.

    A good policy must never be refused for the sake of the stand-in.  So a failure does not count
    when the policy had looked at the session (anything but its id), except an undefined name; and
    no other kind of exception counts, for a file or a name server may be missing here only.  Where
    such a failure ends config(), a line says so with its place: what follows there is unchecked.
    What does not return in time is left alone and said.

Threads: the rehearsal has one of its own, so that policy code that waits cannot hold the check.
"""

from __future__ import annotations

import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable

from Zorp import Globals
from Zorp.acceptance.binds import DBSockAddr
from Zorp.Constants import ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.Dispatch import Dispatcher
from Zorp.engine import attributes, builtin_proxy, config_lint, policy_hash
from Zorp.Exceptions import MatcherException, PolicyError
from Zorp.Log import log
from Zorp.Session import MasterSession, StackedSession
from Zorp.SockAddr import SockAddrInet
from Zorp.Stream import streamPair

DEADLINE_S = 10.0
_OWN = "Zorp."
_NEUTRAL = frozenset({"session_id", "master_session_id", "setProxy", "__dict__", "__class__"})
_REFUSING = (attributes.__file__, policy_hash.__file__, builtin_proxy.__file__)      # the last: config cannot be called


class StandIn(StackedSession):
    """A session without a client that notes whether the policy looked at it."""

    was_read = False

    def __getattribute__(self, name):
        if name not in _NEUTRAL and not str(sys._getframe(1).f_globals.get("__name__", "")).startswith(_OWN):
            super().__setattr__("was_read", True)
        return super().__getattribute__(name)


class Rehearsal:
    """The config() of all proxy classes of the loaded policy, once."""

    def __init__(self, is_policy_file: Callable[[str], bool]) -> None:
        self.is_policy_file = is_policy_file
        self.failures: list[BaseException] = []

    def run(self) -> None:
        """Fill `failures` with what would fail for every client."""
        actors = {}
        for service in Globals.services.values():
            if getattr(service, "proxy_class", None) is not None:
                actors.setdefault(service.proxy_class, service)
        worker = threading.Thread(target=self._play, args=(actors,), daemon=True, name="check")
        worker.start()
        worker.join(DEADLINE_S)
        if worker.is_alive():
            log(None, "core.policy", 2, "config() of a proxy did not return in time, not all of them are checked; "
                "seconds='%d'", (DEADLINE_S,))

    def _play(self, actors) -> None:
        for proxy_class, service in actors.items():
            near, far = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._configure(proxy_class, service, near)
            except BaseException as problem:         # of the stand-in: says nothing about the policy
                self._say_unchecked(problem, proxy_class)
            finally:
                near.close()
                far.close()

    def _configure(self, proxy_class, service, stream) -> None:
        address = SockAddrInet("127.0.0.1", 1024)
        listener = DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_TCP)
        master = MasterSession(service, stream, address, listener, address)
        session = StandIn(master, getattr(service, "chainer", None))
        session.client_stream = stream
        proxy = proxy_class(session)
        session.was_read = False
        proxy.__dict__["_policy_failed"] = _raise_as_it_is
        try:
            proxy._configure()
        except BaseException as problem:
            if not self._counts(problem, proxy, session.was_read):
                raise
            self.failures.append(self._placed(problem, proxy_class, service))
        else:
            if not session.was_read:
                problems = [found for found in proxy._config_problems() if found.is_fatal]
                if proxy_class in _served_by_udp():
                    problems += proxy._datagram_problems()
                self.failures += [self._failure(found, proxy_class, service) for found in problems]

    @staticmethod
    def _failure(found, proxy_class, service) -> PolicyError:
        place = config_lint.place_of(proxy_class, found.key)
        return PolicyError(f"{found.text}; class='{proxy_class.__name__}'", remedy=found.remedy,
                           place=str(service.place) if place == "unknown" else place)

    def _say_unchecked(self, problem: BaseException, proxy_class) -> None:
        """Say where the rehearsal of a class ended."""
        steps = [step for step in traceback.extract_tb(problem.__traceback__) if self.is_policy_file(step.filename)]
        if steps:
            log(None, "core.policy", 2, "config() cannot be finished without a client, what follows this line is not "
                "checked; class='%s', place='%s', error='%s'",
                (proxy_class.__name__, f"{steps[-1].filename}:{steps[-1].lineno}", problem))
        else:
            log(None, "core.debug", 4, "Proxy class cannot be checked without a session; class='%s', error='%s'",
                (proxy_class.__name__, problem))

    def _counts(self, problem: BaseException, proxy, was_read: bool) -> bool:
        """Whether every client would have met this."""
        frames = traceback.extract_tb(problem.__traceback__)
        if isinstance(problem, NameError):
            return self.is_policy_file(frames[-1].filename)
        if was_read:
            return False
        if isinstance(problem, (PolicyError, MatcherException)):
            return True
        if isinstance(problem, AttributeError):          # no other object has its names from the policy alone
            return problem.obj is proxy or isinstance(problem.obj, (type, types.ModuleType, super))
        return isinstance(problem, (TypeError, ValueError)) and frames[-1].filename in _REFUSING

    def _placed(self, problem: BaseException, proxy_class, service) -> BaseException:
        """What the engine found has no line of the policy in it: give it that of config(), else that of the service."""
        frames = traceback.extract_tb(problem.__traceback__)
        if any(self.is_policy_file(frame.filename) for frame in frames):
            return problem
        code = getattr(getattr(proxy_class, "config", None), "__code__", None)
        place = str(getattr(service, "place", "unknown"))
        if code is not None and self.is_policy_file(code.co_filename):
            place = f"{code.co_filename}:{code.co_firstlineno}"
        text, remedy = (problem.problem, problem.remedy) if isinstance(problem, PolicyError) else (
            str(problem), "correct config() and what it sets")
        return PolicyError(f"{text}; class='{proxy_class.__name__}'", remedy=remedy, place=place)


def _served_by_udp() -> set[type]:
    """Return the proxy classes that clients of UDP get for certain: by a dispatcher with one service."""
    return {dispatcher.service.proxy_class for dispatcher in Globals.dispatches
            if dispatcher.protocol == ZD_PROTO_UDP and type(dispatcher).getService is Dispatcher.getService
            and getattr(dispatcher.service, "proxy_class", None) is not None}


def _raise_as_it_is(problem: BaseException):
    raise problem
