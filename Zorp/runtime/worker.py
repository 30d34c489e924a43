"""One policy in one process: load it, listen, serve, hand over, drain.

Theory of operation
    The master forks a worker and talks to it over a channel.  The main thread of the worker
    loads the policy, asks the master for the listening sockets, reports "loaded" and then runs
    the loop below, which never runs policy code for a connection; sessions live in the threads
    of the pool.

        from the master    go        accept; carries what the predecessor handed over
                           retire    stop accepting, hand over, finish the sessions, exit
                           stop      stop accepting, wait up to the grace, clean up if in force, exit
                           ask       a question of the control socket; the loop answers it
                           ping      answer at once: the loop turns
                           verbosity change the level
                           info      facts for the `info` branch that only the master knows
                           describe  have the packet rules of this policy put in force
                           revoke    a step of ending sessions that a newer policy refuses
                           judged    what the worker that serves says about a session of ours
        to the master      listen    needs a listening socket; the answer carries the descriptor
                           unlisten  needs it no more: its address has gone from the interface
                           loaded    the policy is loaded and every bind made; carries its text, sealed,
                                     and the digests of it, unless the text came from the master
                           described the packet rules are in force
                           failed    it is not loaded, or its packet rules were refused; carries the exit status
                           handover  session numbers, counters, log settings for the successor
                           judge     may a session of ours go on under the policy in force
                           order     a signal or the policy wants the instance to stop, reload, quit

    A worker without its master ends at once: the kernel kills it (parent-death signal), and the
    loop ends when the channel does.

Signals sent to a worker mean the instance, because the pid file names the worker: TERM, INT and
HUP become orders to the master; USR1 and USR2 change the level of this process only.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import errno
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import Zorp
from Zorp import Config, Globals, Log
from Zorp.acceptance.instance_numbers import numbers
from Zorp.engine.builtin_proxy import running
from Zorp.Log import log
from Zorp.process.logflush import LogFlusher
from Zorp.process.signals import SignalPipe
from Zorp.process.timers import Timers
from Zorp.runtime import privileges
from Zorp.runtime.acceptor import Acceptor
from Zorp.runtime.admission import Admission
from Zorp.runtime.answers import Answers
from Zorp.runtime.binding import BindFailed, Binding, ImpossibleBind
from Zorp.runtime.channel import Channel, ChannelClosed, Message
from Zorp.runtime.consent import Consent
from Zorp.runtime.daemonise import title
from Zorp.runtime.interpreter import refuse_forks
from Zorp.runtime.judgement import STEPS
from Zorp.runtime.listeners import ListenSpec
from Zorp.runtime.loader import Loader, LoadFailed
from Zorp.runtime.logsetup import LogSetup, change_verbosity
from Zorp.runtime.needs import unused_capabilities
from Zorp.runtime.options import Options
from Zorp.runtime.packetrules import PacketRules, RulesRefused
from Zorp.runtime.stdio import CapturedOutput
from Zorp.runtime.texts import AcceptedText
from Zorp.runtime.threads import PoolLimits, ThreadPool
from Zorp.runtime.uncaught import log_uncaught
from Zorp.SockAddr import from_sockaddr
from Zorp.Szig import statistics
from Zorp.transport.cpus import LOOK_S, home
from Zorp.Zone import Zone
from Zorp.zones.names import ZoneNames

EXIT_OK = 0
EXIT_SETUP = 1
EXIT_POLICY = 2

TICK_S = 5.0                     # the rates of the statistics
_NAMES_PATIENCE_S = 5.0          # for host names of zones, before sessions are judged by them
CUT_S = 1.0                      # from the order to end to the end, for a session that is cut
_CUT_INFO = "instance stopped"   # info of its summary line
_BIND_ATTEMPTS = 10
_BIND_PAUSE_S = 0.1
_BASE_THREADS = 3                # what an idle instance always showed: main loop, statistics, one more
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

    def __init__(self, options: Options, identity: Identity, channel: Channel, log_setup: LogSetup,
                 accepted: AcceptedText | None = None) -> None:
        """accepted: the text of the policy that is in force, for a replacement; None: load what is on disk."""
        self._options = options
        self._identity = identity
        self._channel = channel
        self._log_setup = log_setup
        self._put_aside: collections.deque[Message] = collections.deque()
        self._selector = selectors.DefaultSelector()
        self._timers = Timers()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._binding = Binding(self._ask_for_listener, lambda key: channel.send("unlisten", key=key))
        self._acceptor = Acceptor()
        self._answers = Answers()
        self._exit_status: int | None = None
        self._terms = 0
        self._posted: collections.deque[Callable[[], None]] = collections.deque()     # by other threads, for the loop
        self._retired = False
        self._cleans_up = False
        self._zone_names: ZoneNames | None = None
        self._packet_rules = PacketRules(options)
        self._consent = Consent(channel.send, max(options.reload_patience, 1))
        self._accepted = accepted
        self._loader = Loader(options.policy, options.names, identity.name, identity.is_master, accepted)

    def run(self) -> int:
        """Live; return the exit status."""
        title.show_worker(self._identity.name, self._identity.is_master)
        self._signals = SignalPipe(_SIGNALS)
        self._log_setup.after_fork()
        log_uncaught()
        sys.stdout.reconfigure(line_buffering=True)
        Globals.quit_handler = self._quit
        Globals.initial_policy_load = self._identity.initial
        Config.config.options.session_id_format = self._options.session_id_format
        try:
            if not self._identity.initial:
                self._capture_output()
            if not self._load():
                return EXIT_POLICY
            return self._serve()
        except ChannelClosed:
            return EXIT_SETUP

    # ---- loading

    def _load(self) -> bool:
        try:
            self._packet_rules.announce(in_force=self._accepted is not None)
            self._text = self._loader.load()
            self._binding.bind(Globals.dispatch_table.chains())
            Globals.dispatch_table.seal()
        except LoadFailed as failure:
            failure.log()
            self._give_up(str(failure))
            return False
        except BindFailed as failure:            # in the log already
            self._give_up(failure.reason)
            return False
        except (RulesRefused, ImpossibleBind) as refusal:
            self._refused(refusal)
            return False
        return True

    def _give_up(self, reason: str) -> None:
        if self._options.syslog and self._identity.initial:
            words = f"{self._identity.name}: {reason}\n"        # who typed the command reads no syslog
            self._log_setup.stderr.packet(words.encode("utf-8", "backslashreplace"))
        self._deinitialise()
        self._channel.send("failed", status=EXIT_POLICY, reason=reason)

    def _refused(self, refusal: RulesRefused | ImpossibleBind) -> None:
        log(None, "core.error", 0, "%s", (refusal,))
        self._give_up(str(refusal))

    def _ask_for_listener(self, spec: ListenSpec) -> socket.socket:
        """Get one socket from the master.

        At the first start an address in use is tried for a second: after a kill -9 of the master
        its workers need a moment to die.
        """
        attempts = _BIND_ATTEMPTS if self._identity.initial else 1
        while True:
            self._channel.send("listen", spec=dataclasses.asdict(spec))
            answer = self._wait_for("listener")
            if answer.get("error") is None:
                return socket.socket(fileno=answer.descriptors[0])
            attempts -= 1
            if not attempts or answer["error"] != os.strerror(errno.EADDRINUSE):
                raise BindFailed(answer["step"], answer["error"], answer["obstacle"])
            time.sleep(_BIND_PAUSE_S)

    def _wait_for(self, kind: str) -> Message:
        """The next message of this kind; others wait for the loop."""
        while True:
            message = self._channel.receive()
            if message is not None and message.kind == kind:
                return message
            if message is not None:
                self._put_aside.append(message)

    # ---- the loop

    def _serve(self) -> int:
        refuse_forks(self._loader.is_policy_file)
        gc.collect()
        gc.freeze()                      # the policy lives as long as we do: no collection need look at it
        if not self._options.no_caps:
            privileges.give_up(unused_capabilities())
        options = Config.config.options
        if options.one_cpu:
            home.settle()
        self._pool = ThreadPool(
            PoolLimits(max_threads=self._options.threads, idle_threads=self._options.idle_threads,
                       max_queued=options.max_queued_sessions),
            self._acceptor, statistics, self._options.stack_kib,
            Admission(options.max_accepts_per_second))
        Globals.threads = self._pool
        self._flusher = LogFlusher(self._log_setup.sink, self._selector, self._timers)
        self._log_setup.sink.on_backlog = self._wake_up
        self._selector.register(self._channel, selectors.EVENT_READ, self._take_message)
        self._selector.register(self._signals, selectors.EVENT_READ, self._take_signals)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._report_loaded()
        while self._exit_status is None:
            while self._put_aside:
                self._handle(self._put_aside.popleft())
            for key, _events in self._selector.select(self._timers.timeout()):
                key.data()
            self._timers.run_due()
        return self._exit_status

    def _report_loaded(self) -> None:
        """Tell the master, and give it the text of the policy, which a replacement of this process will need."""
        text, self._text = self._text, None
        self._file_stamp = text.file_stamp
        if self._accepted is not None:
            self._accepted = None
            changed = text.changed_files()
            if changed:
                log(None, "core.info", 3, "Policy files were changed and not reloaded, the text in force goes on; "
                    "process='%s', files='%s'", (self._identity.name, ", ".join(changed)))
            self._channel.send("loaded", file_stamp=text.file_stamp, digests={})
            return
        sealed = text.seal()
        try:
            self._channel.send("loaded", file_stamp=text.file_stamp, digests=text.digests(), descriptors=(sealed,))
        finally:
            os.close(sealed)

    def _take_message(self) -> None:
        message = self._channel.receive()
        if message is not None:
            self._handle(message)

    def _handle(self, message: Message) -> None:
        getattr(self, f"_on_{message.kind}")(message)

    def _wake_up(self) -> None:
        """Any thread: the loop has something to do."""
        os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)
        self._flusher.flush()
        while self._posted:
            self._posted.popleft()()

    def _post(self, job: Callable[[], None]) -> None:
        """Any thread: let the loop do this."""
        self._posted.append(job)
        self._wake_up()

    def _tick(self) -> None:
        self._timers.after(TICK_S, self._tick)
        statistics.tick(TICK_S)
        home.look()
        self._timers.after(LOOK_S, home.review)
        self._log_setup.tick()

    # ---- orders of the master

    def _on_describe(self, message: Message) -> None:
        try:
            self._packet_rules.hand_over()
        except RulesRefused as refusal:
            self._refused(refusal)
            self._exit_status = EXIT_POLICY
            return
        self._channel.send("described")

    def _on_go(self, message: Message) -> None:
        self._adopt(message["handover"])
        if self._identity.initial:
            self._capture_output()
        self._publish_info()
        listening = self._binding.sockets()
        for sock, chain in listening:
            log(chain.entries[0].session_id if chain.entries else None, "core.debug", 7,
                "Start to listen; fd='%d', address='%s'",
                (sock.fileno(), from_sockaddr(sock.family, sock.getsockname())))
            self._acceptor.add(sock, chain)
        if self._binding.watch is not None:
            self._selector.register(self._binding.watch, selectors.EVENT_READ,
                                    lambda: self._binding.follow(self._acceptor))
        Globals.initial_policy_load = False
        for _thread in range(_BASE_THREADS + self._options.syslog):
            statistics.thread_started()
        self._tick()
        if Zone.has_dynamic_subnet:
            self._zone_names = ZoneNames(Zone.zone_subnet_tree)
            self._zone_names.start()
        self._pool.begin()
        log(None, "core.info", 4, "Accepting connections; process='%s', generation='%d', listeners='%d'",
            (self._identity.name, self._identity.generation, len(listening)))

    def _adopt(self, handed_over: dict) -> None:
        if not handed_over:
            return
        numbers.adopt(handed_over["numbers"])
        statistics.adopt_state(handed_over["statistics"])
        Log.set_filter(Log.Filter(handed_over["verbosity"], handed_over["log_spec"]))

    def _on_retire(self, message: Message) -> None:
        self._acceptor.stop()
        present = Log.current_filter()
        self._channel.send("handover", state={
            "numbers": numbers.snapshot(), "statistics": statistics.export_state(),
            "verbosity": present.verbosity, "log_spec": present.spec})
        self._retired = True
        self._pool.when_delivered(lambda: self._post(self._deinitialise))    # it takes the dispatchers away
        self._end_with_sessions(message["within_s"])

    def _deinitialise(self) -> None:
        self._loader.call_if_defined("deinit", self._options.names, self._identity.name)

    def _on_stop(self, message: Message) -> None:
        self._acceptor.stop()
        self._cleans_up = message["is_in_force"]
        self._end_with_sessions(message["within_s"])

    def _on_ask(self, message: Message) -> None:
        try:
            text = self._answers.answer(message["line"])
        except Exception:                # a defect of ours costs the answer, not the sessions
            Log.log_exception(None)
            text = "FAIL Internal error"
        self._channel.send("answer", number=message["number"], text=text)

    def _on_revoke(self, message: Message) -> None:
        """A step of a revocation; judging has a thread of its own, because it asks the policy.

        The other steps are taken here: the sessions that are ended may be our last, and then the
        loop ends this process, but not before it has answered how many they were.
        """
        if message["step"] != "judge":
            self._take_part_in_revocation(message)
            return
        thread = threading.Thread(target=self._take_part_in_revocation, args=(message,), name="revocation", daemon=True)
        try:
            thread.start()
        except RuntimeError as problem:          # no answer is a refusal, or told as a failure
            log(None, "core.error", 2, "Error starting new thread; error='%s'", (problem,))

    def _take_part_in_revocation(self, message: Message) -> None:
        try:
            step = message["step"]
            if step == "judge" and self._zone_names is not None:
                self._zone_names.tried_all.wait(_NAMES_PATIENCE_S)
            if step == "describe":
                Globals.newer_policy = self._consent     # before the list is made: who is not in it asks
                self._refuse_queued()
            text = json.dumps(STEPS[step](message["sessions"]))
        except Exception:                # ours: the master goes on without an answer
            Log.log_exception(None)
            return
        with contextlib.suppress(ChannelClosed):
            self._channel.send("answer", number=message["number"], text=text)

    def _on_judged(self, message: Message) -> None:
        text = message["text"]
        self._consent.answered(message["number"], None if text is None else json.loads(text))

    def _on_ping(self, message: Message) -> None:
        self._channel.send("pong")

    def _on_verbosity(self, message: Message) -> None:
        self._shift_verbosity(message["change"])

    def _on_info(self, message: Message) -> None:
        self._answers.set_info(**message["leaves"])

    def _publish_info(self) -> None:
        now = int(time.time())
        self._answers.set_info(
            policy__file=self._options.policy, policy__file_stamp=self._file_stamp, policy__reload_stamp=now,
            policy__packet_rules="kzorpd" if self._packet_rules.wanted else "none", version=Zorp.__version__,
            pid=os.getpid(), started=now, instance=self._options.instance, process=self._identity.name)

    def _capture_output(self) -> None:
        """What is printed from now on goes to the log, when that is the system log."""
        if self._options.syslog:
            captured = CapturedOutput()
            self._selector.register(captured, selectors.EVENT_READ,
                                    lambda: captured.read() or self._selector.unregister(captured))

    # ---- the end

    def _end_with_sessions(self, within_s: float) -> None:
        self._pool.when_idle(lambda: self._post(self._end))
        if within_s <= 0:
            self._cut_sessions()
        else:
            self._timers.after(within_s, self._cut_sessions)

    def _cut_sessions(self) -> None:
        """Ask what still runs to end now, and give it a moment to write its summary."""
        self._refuse_queued()
        cut = running.all()
        for proxy in cut:
            proxy.session.getMasterSession().summary_info = _CUT_INFO
            proxy.request_stop()
        self._timers.after(CUT_S, self._abandon)

    def _refuse_queued(self) -> None:
        """Connections that wait for a thread must not begin any more."""
        refused = self._pool.refuse_queued()
        if refused:
            log(None, "core.error", 2, "Connections waiting for a thread refused, this policy ends; count='%d'",
                (refused,))

    def _abandon(self) -> None:
        """What policy code still holds is left behind; the log names it, because it will write no summary."""
        for proxy in running.all():
            log(proxy.session.getMasterSession().session_id, "core.error", 1,
                "Session abandoned, the instance stops and policy code does not return;")
            proxy.abandon()                      # the kernel ends its connections, and in order unless told otherwise
        self._end()

    def _end(self) -> None:
        if self._exit_status is not None:        # told twice: a stop after a reload
            return
        if self._cleans_up:
            self._loader.call_if_defined(
                "cleanup", self._options.names, self._identity.name, int(self._identity.is_master))
        elif not self._retired:          # never in force: the load failed in another process
            self._deinitialise()
        self._exit_status = EXIT_OK

    def _quit(self, exit_code) -> None:
        """quit() of the policy; any thread."""
        log(None, "core.info", 0, "Policy ends the instance; exit_code='%s', thread='%s'",
            (exit_code, threading.current_thread().name))
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
