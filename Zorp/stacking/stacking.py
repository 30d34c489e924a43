"""Stacking: the content of one proxy goes through another proxy, or through a program.

Theory of operation
    stack_object(proxy, form) starts what a stack form describes and returns a Stacked: the two
    ends that the parent keeps, named client_downstream and server_downstream, and the child's
    verdict on the content.

        proxy class, (Z_STACK_PROXY, class)             a child proxy between two socket pairs
        text, (Z_STACK_PROGRAM, command)                a program: Zorp.process.program
        (Z_STACK_PROVIDER, name, info)                  what a StackingProvider's backend offers
        (Z_STACK_CUSTOM, backend, info)                 the same for a backend object
        (Z_STACK_PROXY_IN_SESSION, class, session, client stream or None, server stream or None)
                                                        a child proxy in a session that the policy made

    In a transfer of one direction the parent writes the content into the child's client side and
    reads the result from its server side, whatever the real direction is; one_way() closes the
    other halves.  Plug uses both pairs in both directions.

Fails closed
    A child proxy that crashes, times out or is stopped, a program that exits with a status, and
    whatever cannot be started are errors, never an acceptance; see Zorp.stacking.content_verdict.

Life
    The proxy that stacked closes its Stacked, at the latest when it ends itself.  The child then
    sees the end of its streams; a program is killed with its process group.

Threads
    A Stacked belongs to the thread of its parent, except abort(), which any thread may call.

Deviations
    The transfer's ends stay in blocking mode and are read with MSG_DONTWAIT.  Remote stacking has
    no published protocol and is refused with a log line.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from typing import NamedTuple

from Zorp import Globals
from Zorp.Config import config
from Zorp.Constants import (
    CORE_DEBUG,
    CORE_ERROR,
    CORE_POLICY,
    Z_STACK_CUSTOM,
    Z_STACK_PROGRAM,
    Z_STACK_PROVIDER,
    Z_STACK_PROXY,
    Z_STACK_PROXY_IN_SESSION,
    ZV_ACCEPT,
)
from Zorp.engine.builtin_proxy import BuiltinProxy, log_policy_exception
from Zorp.Log import log
from Zorp.process import program as programs
from Zorp.stacking.content_verdict import ContentVerdict
from Zorp.stacking.program import ControlChannel, ProgramWatch
from Zorp.Stream import Stream, streamPair

DEEPEST = 16                     # sessions below a master's; a child that stacks its own kind would never end
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class StackingFailed(Exception):
    """Nothing was stacked; the reason is in the log."""


class StackForm(NamedTuple):
    """A stack object taken apart: the method, and what belongs to it."""

    method: int
    arguments: tuple


_LENGTHS = {Z_STACK_PROXY: (2,), Z_STACK_PROGRAM: (2,), Z_STACK_PROVIDER: (2, 3), Z_STACK_CUSTOM: (2, 3),
            Z_STACK_PROXY_IN_SESSION: (5,)}


def parse_form(form) -> StackForm | None:
    """Return the method and its arguments, None for a malformed form; unknown methods pass."""
    if isinstance(form, str):
        form = (Z_STACK_PROGRAM, form)
    elif isinstance(form, type):
        form = (Z_STACK_PROXY, form)
    if not isinstance(form, (tuple, list)) or not form or not isinstance(form[0], int):
        return None
    method, *arguments = form
    if method in _LENGTHS and len(form) not in _LENGTHS[method]:
        return None
    if method == Z_STACK_PROVIDER and len(arguments) == 1:
        arguments = arguments[0]                     # the older form with a tuple inside
        if not isinstance(arguments, (tuple, list)) or len(arguments) != 2:
            return None
    if method in (Z_STACK_PROXY, Z_STACK_PROXY_IN_SESSION) and not _is_proxy_class(arguments[0]):
        return None
    if method == Z_STACK_PROGRAM and (not isinstance(arguments[0], str) or "\0" in arguments[0]):
        return None
    return StackForm(method, tuple(arguments))


def problem_of(form) -> str | None:
    """Return why no session could stack what this finished policy asks for, None when one may."""
    parsed = parse_form(form)
    if parsed is None:
        return f"Nothing can be stacked by this form; form='{form!r}'"
    if parsed.method not in _METHODS:
        return f"No such stacking method; method='{parsed.method:d}'"
    provider = parsed.arguments[0] if parsed.method == Z_STACK_PROVIDER else None      # or a backend itself
    if isinstance(provider, str) and provider not in Globals.stacking_providers:
        return f"No such stacking provider; provider='{provider}'"
    return None


def _is_proxy_class(value) -> bool:
    return isinstance(value, type) and issubclass(value, BuiltinProxy)


class Stacked:
    """A child and the parent's ends of it.

    client, server      Streams: what goes to and comes from the child's two sides
    verdict             what the child says about the content
    child_end           a child proxy's own end of its client side: tells one child from another
    watch               of a program
    """

    def __init__(self, proxy, client: Stream | None, server: Stream | None, verdict: ContentVerdict,
                 hears_verdicts: bool) -> None:
        self.client, self.server, self.verdict = client, server, verdict
        self._proxy = proxy
        self.hears_verdicts = hears_verdicts
        self.child_end: Stream | None = None
        self.watch: ProgramWatch | None = None
        session_id = proxy.session.session_id
        for stream, side in ((client, "client"), (server, "server")):
            if stream is not None:
                stream.name = f"{session_id}/{side}_downstream"
        proxy.add_stacked(self)

    def is_joined_to(self, child_end: Stream) -> bool:
        """Tell whether this is the child whose own end of the client side is given."""
        return child_end is not None and child_end is self.child_end

    def hear_verdict(self, verdict: int, description: str) -> None:
        """Take the verdict of a child proxy; a parent without a transfer does not listen.  Child's thread."""
        if self.hears_verdicts:
            self.verdict.give(verdict, description)

    def hear_length(self, length: int) -> None:
        """Take the announced length of the output.  Child's thread."""
        self.verdict.content_length = length

    def one_way(self) -> None:
        """Content goes in at the client side and comes out at the server side only."""
        self.client.sock.shutdown(socket.SHUT_RD)
        self.server.sock.shutdown(socket.SHUT_WR)

    def settle(self) -> None:
        """Take in what the child has said so far; to be called before its first output is passed on."""
        if self.watch is not None:
            self.watch.settle()

    def conclude(self) -> None:
        """The output has ended: make the verdict final.  Waits for the exit of a program, within bounds."""
        if self.watch is not None:
            self.watch.conclude()

    def has_failed(self, is_last: bool) -> bool:
        """The child has ended an output: tell whether it broke.  is_last: it has no other output any more.

        Waits for the exit of a program that has none, within bounds; otherwise only for one that is dying.
        """
        if is_last or (self.watch is not None and self.watch.has_died()):
            self.conclude()
        return self.verdict.value != ZV_ACCEPT

    def abort(self) -> None:
        """Wake whoever waits for the child; for any thread, never raises."""
        for stream in (self.client, self.server):
            if stream is not None:
                stream.abort()

    def close(self) -> None:
        """Let go of the child; a second call does nothing."""
        self._proxy.drop_stacked(self)
        for stream in (self.client, self.server):
            if stream is not None and stream.fileno() >= 0:
                stream.shutdown(socket.SHUT_RDWR)
                stream.close()
        if self.watch is not None:
            self.watch.close()


def stack_object(proxy, form, *, hears_verdicts: bool = False) -> Stacked:
    """Start what the form describes inside `proxy`; raises StackingFailed.

    hears_verdicts: the parent has a transfer that obeys what the child says.
    """
    parsed = parse_form(form)
    session_id = proxy.session.session_id
    if parsed is None:
        log(session_id, CORE_POLICY, 1, "Invalid stack tuple;")
        raise StackingFailed
    _check_depth(proxy, session_id)
    start = _METHODS.get(parsed.method)
    if start is None:
        log(session_id, CORE_ERROR, 3, "Unsupported stacking method; method='%d'", (parsed.method,))
        raise StackingFailed
    return start(proxy, hears_verdicts, *parsed.arguments)


def _check_depth(proxy, session_id: str) -> None:
    depth, session = 0, proxy.session
    while (session := getattr(session, "owner", None)) is not None:
        depth += 1
    if depth > DEEPEST:
        log(session_id, CORE_ERROR, 3, "Stacking too deep; depth='%d', max='%d'", (depth, DEEPEST))
        raise StackingFailed


class _Pairs:
    """The socket pairs of one child: parent's ends and child's ends, all closed again when it fails."""

    def __init__(self, session_id: str, *names: str) -> None:
        self.ours: list[Stream] = []
        self.theirs: list[Stream] = []
        for name in names:
            try:
                ours, theirs = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
            except OSError as problem:
                log(session_id, CORE_ERROR, 1, f"Error creating {name} socketpair for stacked proxy; error='%s'",
                    (problem,))
                self.close()
                raise StackingFailed from problem
            self.ours.append(ours)
            self.theirs.append(theirs)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Parent's and child's descriptor of each pair, for the log."""
        return tuple(stream.fd for pair in zip(self.ours, self.theirs, strict=True) for stream in pair)

    def close(self) -> None:
        for stream in (*self.ours, *self.theirs):
            stream.close()


# ---------------------------------------------------------------------------- child proxies

def _stack_proxy(proxy, hears_verdicts, proxy_class) -> Stacked:
    session_id = proxy.session.session_id
    pairs = _Pairs(session_id, "client", "server")
    log(session_id, CORE_DEBUG, 6, "Stacking subproxy; client='%d:%d', server='%d:%d'", pairs.descriptors)
    stacked = Stacked(proxy, *pairs.ours, ContentVerdict(session_id), hears_verdicts)
    stacked.child_end = pairs.theirs[0]
    try:
        child = proxy.stackProxy(*pairs.theirs, proxy_class, None)
    except Exception as problem:
        log_policy_exception(session_id, problem)
        child = None
    if not isinstance(child, BuiltinProxy):
        log(session_id, CORE_ERROR, 3, "Error stacking subproxy;")
        stacked.close()
        pairs.close()
        raise StackingFailed
    return stacked


def _stack_proxy_in_session(proxy, hears_verdicts, proxy_class, session, client_stream, server_stream) -> Stacked:
    """A side for which no stream is given, and which the session lacks as well, gets a socket pair."""
    session_id = proxy.session.session_id
    own = {"client": client_stream, "server": server_stream}
    missing = [side for side, stream in own.items()
               if stream is None and vars(session).get(f"{side}_stream") is None]
    pairs = _Pairs(session_id, *missing)
    ends = dict(zip(missing, pairs.ours, strict=True))
    own.update(zip(missing, pairs.theirs, strict=True))
    for side, stream in own.items():
        if stream is not None:
            setattr(session, f"{side}_stream", stream)
            stream.name = f"{upstream_prefix(proxy.session.session_id, proxy_class)}/{side}_upstream"
    stacked = Stacked(proxy, ends.get("client"), ends.get("server"), ContentVerdict(session_id), hears_verdicts)
    stacked.child_end = session.client_stream
    try:
        child = proxy.stackProxyInSession(proxy_class, session, None)
    except Exception as problem:
        log_policy_exception(session_id, problem)
        child = None
    if not isinstance(child, BuiltinProxy):
        log(session_id, CORE_ERROR, 3,
            "Error stacking subproxy, the proxy object returned by stackProxyInSession() is invalid;")
        stacked.close()
        pairs.close()
        raise StackingFailed
    return stacked


def upstream_prefix(session_id: str, proxy_class) -> str:
    """Return the parent's session id with the child's protocol in the last place."""
    return f"{session_id.rpartition('/')[0]}/{proxy_class.name}"


# ---------------------------------------------------------------------------- programs

def _stack_program(proxy, hears_verdicts, command) -> Stacked:
    session_id = proxy.session.session_id
    pairs = _Pairs(session_id, "client", "server", "control")
    client, server, control = pairs.ours
    log(session_id, CORE_DEBUG, 6,
        "Stacking program; client='%d:%d', server='%d:%d', control='%d:%d', program='%s'",
        (*pairs.descriptors, command))
    limits = programs.ProgramLimits(config.options.stack_program_cpu_seconds, config.options.stack_program_memory)
    verdict = ContentVerdict(session_id)
    channel = ControlChannel(session_id, control.sock, verdict, hears_verdicts)
    sockets = (stream.sock for stream in pairs.theirs)
    start = functools.partial(programs.start, command, *sockets, _environment(proxy.session), limits)
    try:
        watch = ProgramWatch(session_id, command, start, channel, verdict)
    except OSError as problem:
        log(session_id, CORE_ERROR, 2, "Program stacking failed, fork returned error; program='%s', error='%s'",
            (command, problem.strerror))
        pairs.close()
        raise StackingFailed from problem
    for stream in pairs.theirs:
        stream.close()
    stacked = Stacked(proxy, client, server, verdict, hears_verdicts)
    stacked.watch = watch
    if not Globals.threads.start(f"{session_id}/control", watch.watch):
        log(session_id, CORE_ERROR, 2, "Error starting new thread; error='%s'", ("no thread for a stacked program",))
        watch.close()
        watch.watch()                                # ends it at once
        stacked.close()
        raise StackingFailed
    return stacked


def _environment(session) -> dict[str, str]:
    """Return what a program may know; values come from the peer, so they never get into the command itself."""
    values = {"PATH": _PATH, "LANG": "C.UTF-8", "ZORP_SESSION_ID": session.session_id,
              "ZORP_SERVICE": getattr(session.service, "name", "")}
    for name in ("client_address", "client_local", "server_address", "client_zone", "server_zone"):
        with contextlib.suppress(AttributeError):
            if (value := getattr(session, name)) is not None:
                values[f"ZORP_{name.upper()}"] = str(getattr(value, "name", value))
    user = session.getMasterSession().auth_user
    if user:
        values["ZORP_AUTH_USER"] = str(user)
    return {name: value.replace("\0", "") for name, value in values.items()}


# ---------------------------------------------------------------------------- backends

def _stack_custom(proxy, hears_verdicts, backend, stack_info=None) -> Stacked:
    session_id = proxy.session.session_id
    try:
        found = proxy.stackCustom((backend, stack_info))
    except Exception as problem:
        log_policy_exception(session_id, problem)
        found = None
    if not isinstance(found, tuple) or len(found) not in (2, 3) or not all(isinstance(s, Stream) for s in found):
        log(session_id, CORE_ERROR, 3, "Error stacking subproxy;")
        raise StackingFailed
    verdict = ContentVerdict(session_id)
    stacked = _Custom(proxy, *found[:2], verdict, hears_verdicts)
    if len(found) == 3:
        stacked.channel = ControlChannel(session_id, found[2].sock, verdict, hears_verdicts)
    return stacked


class _Custom(Stacked):
    """What a backend gave; its control channel is read by the parent's thread."""

    channel: ControlChannel | None = None

    def settle(self) -> None:
        if self.channel is not None:
            self.channel.pump()

    conclude = settle

    def close(self) -> None:
        super().close()
        if self.channel is not None:
            self.channel.close()


_METHODS = {
    Z_STACK_PROXY: _stack_proxy,
    Z_STACK_PROGRAM: _stack_program,
    Z_STACK_PROVIDER: _stack_custom,
    Z_STACK_CUSTOM: _stack_custom,
    Z_STACK_PROXY_IN_SESSION: _stack_proxy_in_session,
}
