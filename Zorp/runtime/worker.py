"""One policy in one process: load it, listen, serve, hand over, drain.

Theory of operation
    The master forks a worker and talks to it over a channel.  The main thread of the worker
    loads the policy, asks the master for the listening sockets, reports "loaded" and then runs
    the loop below, which never runs policy code for a connection; sessions live in the threads
    of the pool.

        from the master    go        accept; carries what the predecessor handed over
                           retire    stop accepting, hand over, finish the sessions, exit
                           stop      stop accepting, wait up to the grace, clean up, exit
                           ping      answer at once: the loop turns
                           verbosity change the level
        to the master      listen    needs a listening socket; the answer carries the descriptor
                           loaded    the policy is loaded and every bind made
                           failed    it is not; carries the exit status
                           handover  session numbers and counters for the successor
                           order     a signal or the policy wants the instance to stop, reload, quit

    A worker without its master ends at once: the kernel kills it (parent-death signal), and the
    loop ends when the channel does.

Signals sent to a worker mean the instance, because the pid file names the worker: TERM, INT and
HUP become orders to the master; USR1 and USR2 change the level of this process only.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import os
import selectors
import signal
import socket
import threading

from Zorp import Config, Globals, Log
from Zorp.InstanceNumbers import numbers
from Zorp.Log import log
from Zorp.runtime.acceptor import Acceptor
from Zorp.runtime.binding import listen_specs
from Zorp.runtime.channel import Channel, ChannelClosed, Message
from Zorp.runtime.loader import Loader, LoadFailed
from Zorp.runtime.logsetup import change_verbosity
from Zorp.runtime.options import Options
from Zorp.runtime.signals import SignalPipe
from Zorp.runtime.threads import PoolLimits, ThreadPool
from Zorp.runtime.timers import Timers
from Zorp.SockAddr import from_sockaddr

EXIT_OK = 0
EXIT_SETUP = 1
EXIT_POLICY = 2

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which worker this is."""

    name: str                # NAME or NAME#k: pid file, control socket, session ids
    is_master: bool          # what init() of the policy is told
    generation: int          # which load of the policy, counted from 1
    initial: bool            # no load of this instance has succeeded before


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent dies; exit now if that has happened."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(EXIT_SETUP)


class Worker:
    """The process of one policy generation; everything here runs in its main thread unless it says otherwise."""

    def __init__(self, options: Options, identity: Identity, channel: Channel) -> None:
        self._options = options
        self._identity = identity
        self._channel = channel
        self._put_aside: collections.deque[Message] = collections.deque()
        self._timers = Timers()
        self._bound: list[tuple[object, list[socket.socket]]] = []
        self._acceptor = Acceptor()
        self._exit_status: int | None = None
        self._terms = 0
        self._idle_pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._loader = Loader(options.policy, options.names, identity.name, identity.is_master)

    def run(self) -> int:
        """Live; return the exit status."""
        self._signals = SignalPipe(_SIGNALS)
        Globals.quit_handler = self._quit
        Globals.initial_policy_load = self._identity.initial
        Config.config.options.session_id_format = self._options.session_id_format
        try:
            if not self._load():
                return EXIT_POLICY
            self._pool = ThreadPool(
                PoolLimits(max_threads=self._options.threads, idle_threads=self._options.idle_threads,
                           max_queued=getattr(Config.config.options, "max_queued_sessions", 1000)),
                self._acceptor, stack_kib=self._options.stack_kib)
            Globals.threads = self._pool
            self._channel.send("loaded")
            return self._loop()
        except ChannelClosed:
            return EXIT_SETUP

    # ---- loading

    def _load(self) -> bool:
        try:
            self._loader.load()
            self._bind()
        except LoadFailed as failure:
            complaint = failure.complaint
            if complaint is not None:
                for line in complaint.traceback:
                    log(None, "core.error", 0, "Traceback: %s", (line,))
                log(None, "core.error", 0, "%s", (complaint.text,))
            self._loader.call_if_defined("deinit", self._options.names, self._identity.name)
            self._channel.send("failed", status=EXIT_POLICY, reason=complaint.text if complaint else "")
            return False
        return True

    def _bind(self) -> None:
        """Get the sockets of every chain of the policy; nothing is accepted yet."""
        table = Globals.dispatch_table
        chains = table.chains() if table is not None else []
        for chain, specs in listen_specs(chains):
            sockets = [self._ask_for_listener(chain, spec) for spec in specs]
            chain.bound([from_sockaddr(sock.family, sock.getsockname()) for sock in sockets])
            self._bound.append((chain, sockets))

    def _ask_for_listener(self, chain, spec) -> socket.socket:
        self._channel.send("listen", spec=dataclasses.asdict(spec))
        answer = self._wait_for("listener")
        if answer.get("error") is None:
            return socket.socket(fileno=answer.descriptors[0])
        failed_call, error = answer["step"], answer["error"]
        if failed_call == "socket":
            log(None, "core.error", 2, "Cannot create socket; error='%s'", (error,))
        elif failed_call == "listen":
            log(None, "core.error", 3, "listen() failed; bind='%s', error='%s'", (chain.bind.format(), error))
        else:
            log(None, "core.error", 3, "bind() failed; bind='%s', error='%s'", (chain.bind.format(), error))
        log(None, "core.error", 0, "Error binding to interface; bind='%s', error='%s'", (chain.bind.format(), error))
        raise LoadFailed(None)

    def _wait_for(self, kind: str) -> Message:
        """The next message of this kind; others wait for the loop."""
        while True:
            message = self._channel.receive()
            if message is not None and message.kind == kind:
                return message
            if message is not None:
                self._put_aside.append(message)

    # ---- the loop

    def _loop(self) -> int:
        selector = selectors.DefaultSelector()
        selector.register(self._channel, selectors.EVENT_READ, self._take_message)
        selector.register(self._signals, selectors.EVENT_READ, self._take_signals)
        selector.register(self._idle_pipe[0], selectors.EVENT_READ, self._sessions_are_over)
        while self._put_aside:
            self._handle(self._put_aside.popleft())
        while self._exit_status is None:
            for key, _events in selector.select(self._timers.timeout()):
                key.data()
            self._timers.run_due()
        return self._exit_status

    def _take_message(self) -> None:
        message = self._channel.receive()
        if message is not None:
            self._handle(message)

    def _handle(self, message: Message) -> None:
        getattr(self, f"_on_{message.kind}")(message)

    def _on_go(self, message: Message) -> None:
        handed_over = message.get("handover") or {}
        numbers.adopt(handed_over.get("numbers", {}))
        for chain, sockets in self._bound:
            for sock in sockets:
                log(None, "core.debug", 7, "Start to listen; fd='%d', address='%s'",
                    (sock.fileno(), from_sockaddr(sock.family, sock.getsockname())))
                self._acceptor.add(sock, chain)
        Globals.initial_policy_load = False
        self._pool.begin()

    def _on_retire(self, message: Message) -> None:
        self._acceptor.stop()
        self._channel.send("handover", state={"numbers": numbers.snapshot()})
        self._end_with_sessions(message["within_s"], clean_up=False)

    def _on_stop(self, message: Message) -> None:
        self._acceptor.stop()
        self._end_with_sessions(message["within_s"], clean_up=True)

    def _on_ping(self, message: Message) -> None:
        self._channel.send("pong")

    def _on_verbosity(self, message: Message) -> None:
        self._shift_verbosity(message["change"])

    # ---- the end

    def _end_with_sessions(self, within_s: float, clean_up: bool) -> None:
        self._clean_up = clean_up
        if within_s <= 0:
            self._end()
            return
        self._timers.after(within_s, self._end)
        self._pool.when_idle(lambda: os.write(self._idle_pipe[1], b"."))

    def _sessions_are_over(self) -> None:
        os.read(self._idle_pipe[0], 1)
        self._end()

    def _end(self) -> None:
        function, *arguments = ("cleanup", int(self._identity.is_master)) if self._clean_up else ("deinit",)
        self._loader.call_if_defined(function, self._options.names, self._identity.name, *arguments)
        self._exit_status = EXIT_OK

    def _quit(self, exit_code) -> None:
        """quit() of the policy; any thread."""
        log(threading.current_thread().name, "core.info", 0, "Policy ends the instance; exit_code='%s'", (exit_code,))
        self._channel.send("order", what="quit", status=int(exit_code))

    # ---- signals

    def _take_signals(self) -> None:
        for number in self._signals.arrived():
            if number == signal.SIGUSR1:
                self._shift_verbosity(1)
            elif number == signal.SIGUSR2:
                self._shift_verbosity(-1)
            elif number == signal.SIGHUP:
                self._channel.send("order", what="reload")
            else:
                self._terms += 1
                self._channel.send("order", what="stop", urgent=self._terms > 1)

    @staticmethod
    def _shift_verbosity(change: int) -> None:
        change_verbosity(Log.current_filter().verbosity + change)
