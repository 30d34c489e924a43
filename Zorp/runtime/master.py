"""The master: one per instance, keeps the workers, the listening sockets and the pid files.

Theory of operation
    A slot is a virtual process (NAME, or NAME#k).  It has a worker that serves, perhaps a
    successor that is loading, and workers that only finish their sessions.  Three things start
    successors, and all end in one step, _switch():

        the first start    every slot; a failure ends the instance with the worker's status
        a reload           every slot; a failure changes nothing
        a restart          the one slot whose worker crashed; a failure is retried.  It loads the text
                           that is in force (Zorp.runtime.texts), whatever lies on disk

    The step: when every successor of the load has reported "loaded", the first has the packet
    rules of a new policy put in force (Zorp.runtime.packetrules); then the old workers are told to
    retire and answer with session numbers and counters; then the successors are told to go.
    The listening sockets belong to the master and are open all the time.

    Reloads never overlap; one that is wanted while a load goes on waits for it.  A load that may
    hang must not hold it for long: it is abandoned --reload-patience seconds after the order.
    With "revoke", sessions of older policies that the new one refuses are ended after the switch
    (Zorp.runtime.revocation); the reload has ended when that has.

    A worker that ends without having been told to has crashed, whatever its exit status.  It is
    started again after a second, as often as the restart budget of its slot allows; SIGKILL is a
    crash like any other, because stopping is an order to the master.  Reloads cost no budget.
    The phases of a slot (Zorp.runtime.slots) tell a crash from a worker that has handed over and
    leaves while others of the same load have not yet.

    The master never loads a policy, never reads from the network and has one thread, so that
    fork() is safe at any moment.

Deviations: in the foreground modes, too, the master restarts crashed workers; only `background`
never had that.  The failure of one of several slots leaves the others alone; with the last one
the instance ends, status 1.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator

import Zorp
from Zorp import Log
from Zorp.Log import log, log_always
from Zorp.process.notify import Notifier
from Zorp.process.signals import SignalPipe
from Zorp.process.timers import Timers
from Zorp.runtime import packetrules
from Zorp.runtime.channel import Message
from Zorp.runtime.control import ControlServer
from Zorp.runtime.daemonise import StartReport
from Zorp.runtime.listeners import ListenError, ListenerTable, ListenSpec, PortStore, port_store_path
from Zorp.runtime.liveness import Liveness
from Zorp.runtime.logsetup import LogSetup
from Zorp.runtime.options import Options
from Zorp.runtime.pidfile import Directory
from Zorp.runtime.questions import Done, Questions
from Zorp.runtime.reloading import Outcome, Reloads, replaced_program
from Zorp.runtime.revocation import Revocation
from Zorp.runtime.slots import Handle, Load, Phase, Purpose, Slot, State
from Zorp.runtime.supervision import FailureHook, Reporter, RestartBudget
from Zorp.runtime.worker import EXIT_OK, EXIT_SETUP
from Zorp.runtime.workers import CannotStart, Workers

LOAD_DEADLINE_S = 300.0          # a policy that loads longer hangs
HANDOVER_DEADLINE_S = 5.0        # a worker that does not hand over in time is left behind
RESTART_DELAY_S = 1.0
_LOG_FLUSH_S = 0.1

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class Master:
    """See the module's text.  run() returns the exit status of the instance."""

    def __init__(self, options: Options, slots: list[Slot], directory: Directory, log_setup: LogSetup,
                 reporter: Reporter, notifier: Notifier, start_report: StartReport) -> None:
        self._options = options
        self._slots = slots
        self._log_setup = log_setup
        self._reporter = reporter
        self._notifier = notifier
        self._start_report = start_report
        self._has_started = False
        self._listeners = ListenerTable(PortStore(port_store_path(options)))
        self._selector = selectors.DefaultSelector()
        self._timers = Timers()
        self._signals = SignalPipe(_SIGNALS)
        self._workers = Workers(options, self._selector, self._timers, log_setup, self._take_message, self._gone,
                                self._let_go)
        self._questions = Questions(self._workers, self._timers)
        self._loads: list[Load] = []
        self._reloads = Reloads()
        self._generation = 0
        self._stopping = False
        self._exit_status: int | None = None
        self._budgets = {slot: RestartBudget(options.restart_max, options.restart_interval) for slot in slots}
        self._failure_hook = FailureHook(options)
        self._liveness = Liveness(self._timers, options.deadlock_timeout, self._serving, self._workers.send, reporter)
        self._control = ControlServer(directory, self._selector, self._timers, self)

    def run(self) -> int:
        """Live until the instance ends; return its exit status.  Raises ControlError before anything is started."""
        for slot in self._slots:
            self._control.listen(slot)
        self._selector.register(self._signals, selectors.EVENT_READ, self._take_signals)
        self._begin_load(Purpose.INITIAL, self._slots)
        while self._exit_status is None or self._workers:
            for key, events in self._selector.select(self._sleep_s()):
                key.data(events)
            self._timers.run_due()
            self._log_setup.flush()
        self._clean_up()
        return self._exit_status

    def _sleep_s(self) -> float | None:
        sleep_s = self._timers.timeout()
        if self._log_setup.waiting:
            return _LOG_FLUSH_S if sleep_s is None else min(sleep_s, _LOG_FLUSH_S)
        return sleep_s

    def _clean_up(self) -> None:
        for slot in self._slots:
            slot.pid_file.remove()
        self._control.close()
        self._listeners.close()
        if self._has_started and self._exit_status == EXIT_OK:
            packetrules.stopped(self._options)
        if self._has_started:
            log_always("core.info", 3, f"Shutting down; version='{version()}'")
        self._log_setup.drain()
        if not self._has_started:            # also when it was told to stop: whoever waits wants to hear that it serves
            self._start_report(self._exit_status or EXIT_SETUP)

    # ---- starting workers

    def _begin_load(self, purpose: Purpose, slots: list[Slot]) -> None:
        self._generation += 1
        load = Load(purpose, self._generation, list(slots))
        self._loads.append(load)
        for slot in load.slots:
            if purpose is Purpose.INITIAL:           # those after a crash are counted where they are granted
                self._budgets[slot].started()
            try:
                slot.successor = self._workers.start(slot, load.generation, purpose is Purpose.INITIAL,
                                                     slot.text if purpose is Purpose.RESTART else None)
            except CannotStart as problem:
                self._cannot_start(load, str(problem))
                return
        load.deadline = self._timers.after(LOAD_DEADLINE_S, lambda: self._load_died(
            load, f"loading took longer than {LOAD_DEADLINE_S:.0f} seconds"))
        self._tell_info()

    def _cannot_start(self, load: Load, reason: str) -> None:
        """The host has no room for a process: that is no fault of the policy, and may pass."""
        if load.purpose is Purpose.RESTART:
            self._budgets[load.slots[0]].take_back()
        self._load_died(load, reason)

    def _abandon_later(self, load: Load) -> None:
        """A newer order waits: a load that hangs must not keep it from being carried out."""
        patience_s = self._options.reload_patience

        def abandon() -> None:
            if load.is_reading:
                self._load_died(load, f"loading was abandoned after {time.time() - load.began:.0f} seconds, "
                                "because a newer reload waited")

        if load.purpose is not Purpose.INITIAL and load.abandon_timer is None:
            load.abandon_timer = self._timers.after(patience_s, abandon)

    def _let_go(self) -> None:
        """In a new worker: close what is the master's alone."""
        self._signals.close()
        self._selector.close()               # before what is registered there: the epoll is shared with the master
        self._listeners.close()
        self._control.let_go()
        self._notifier.close()
        self._start_report.close()
        for slot in self._slots:
            slot.pid_file.close()
            if slot.text is not None:
                os.close(slot.text)

    def _serving(self) -> Iterator[Handle]:
        return (slot.serving for slot in self._slots if slot.serving is not None)

    # ---- messages

    def _take_message(self, handle: Handle, message: Message) -> None:
        getattr(self, f"_on_{message.kind}")(handle, message)

    def _on_listen(self, handle: Handle, message: Message) -> None:
        try:
            sock = self._listeners.obtain(ListenSpec(**message["spec"]), handle.serial)
        except ListenError as problem:
            self._workers.send(handle, "listener", error=problem.strerror, step=problem.step, obstacle=problem.obstacle)
            return
        self._workers.send(handle, "listener", descriptors=(sock.fileno(),))

    def _on_unlisten(self, handle: Handle, message: Message) -> None:
        self._listeners.give_back(tuple(message["key"]), handle.serial)

    def _on_loaded(self, handle: Handle, message: Message) -> None:
        handle.text = next(iter(message.descriptors), None)      # closed with the worker, or when it is accepted
        load = self._load_of(handle)
        if load is None or handle.state is not State.LOADING:
            return
        handle.state = State.LOADED
        load.file_stamp = message["file_stamp"]
        handle.digests = message["digests"]
        if not all(slot.successor.state is State.LOADED for slot in load.slots):
            return
        if load.differing_files:
            self._load_died(load, "the policy was changed while it was read, load it again; "
                            f"files={', '.join(load.differing_files)}")
        else:
            self._put_rules_in_force(load)

    def _put_rules_in_force(self, load: Load) -> None:
        """What packets meet comes last of what can fail, and before anybody serves by the new policy.

        A replacement follows the policy whose rules are in force.
        """
        first = next((slot.successor for slot in load.slots if slot.is_master), None)
        if first is None or load.purpose is Purpose.RESTART:
            self._switch(load)
        else:
            self._workers.send(first, "describe")

    def _on_described(self, handle: Handle, message: Message) -> None:
        load = self._load_of(handle)
        if load is not None and handle.state is State.LOADED:
            self._switch(load)

    def _on_failed(self, handle: Handle, message: Message) -> None:
        handle.state = State.FAILED
        load = self._load_of(handle)
        if load is not None:
            self._load_failed(load, message["status"], message["reason"])

    def _on_handover(self, handle: Handle, message: Message) -> None:
        slot = handle.slot
        if slot.serving is handle and slot.phase is Phase.HANDING_OVER:      # else it comes too late
            slot.handed_over = message["state"]
            self._has_handed_over(slot)

    def _on_order(self, handle: Handle, message: Message) -> None:
        what = message["what"]
        if what == "reload":
            self.reload()
        elif what == "quit":
            self.stop(message["status"], urgent=True)
        elif not self._stopping or message["urgent"]:
            self.stop(EXIT_OK, urgent=message["urgent"])

    def _on_judge(self, handle: Handle, message: Message) -> None:
        """A session of an older policy wants to go on: ask the worker that serves (Zorp.runtime.consent)."""
        def answered(text: str | None) -> None:
            self._workers.send(handle, "judged", number=message["number"], text=text)

        serving = handle.slot.serving
        if serving is not None and serving.state is State.DRAINING:      # it hands over just now
            serving = handle.slot.successor
        if serving is None:
            answered(None)
        else:
            self._questions.request(serving, "revoke", answered, step="judge", sessions=[message["session"]])

    def _on_pong(self, handle: Handle, message: Message) -> None:
        self._liveness.answered(handle)

    def _on_answer(self, handle: Handle, message: Message) -> None:
        self._questions.answered(handle, message["number"], message["text"])

    # ---- from one policy to the next

    def _load_of(self, handle: Handle) -> Load | None:
        return next((load for load in self._loads if load.generation == handle.generation), None)

    def _switch(self, load: Load) -> None:
        """Every successor is ready: let the predecessors hand over."""
        load.cancel_timers()
        for slot in load.slots:
            if slot.serving is not None:
                slot.phase = Phase.HANDING_OVER
                slot.serving.state = State.DRAINING
                self._workers.send(slot.serving, "retire", within_s=self._options.drain_timeout)
        if load.is_handing_over:
            load.deadline = self._timers.after(HANDOVER_DEADLINE_S, lambda: self._finish_switch(load))
        else:
            self._finish_switch(load)

    def _has_handed_over(self, slot: Slot) -> None:
        slot.phase = Phase.HANDED_OVER
        load = next((load for load in self._loads if slot in load.slots), None)
        if load is not None and not load.is_handing_over:
            self._finish_switch(load)

    def _finish_switch(self, load: Load) -> None:
        load.cancel_timers()
        self._loads.remove(load)
        for slot in load.slots:
            self._put_into_service(slot)
        if load.purpose is Purpose.INITIAL:
            self._started()
        elif load.purpose is Purpose.RELOAD:
            self._log_success(load)
            self._notifier.send("READY=1")
            if self._reloads.is_revoking:
                Revocation(self._workers, self._questions, self._timers, self._slots,
                           max(self._options.reload_patience, 1), self._reloaded)
            else:
                self._reloads.ended(Outcome(True))
        for handle in list(self._serving()):
            if handle.early_end is not None:
                self._gone(handle, handle.early_end)
        self._tell_info()
        self._next_reload()

    def _reloaded(self, revoked: int, problem: str) -> None:
        """The revocation of a reload has ended."""
        self._reloads.ended(Outcome(True, problem, revoked))
        self._tell_info()
        self._next_reload()

    def _log_success(self, load: Load) -> None:
        """Say which text is in force: the file may have changed once more since."""
        log(None, "core.info", 3, "Policy reloaded; policy_file='%s', file_stamp='%s', generation='%d'",
            (self._options.policy, _shown(load.file_stamp), load.generation))

    def _put_into_service(self, slot: Slot) -> None:
        old, new = slot.serving, slot.successor
        slot.serving, slot.successor = new, None
        slot.phase = Phase.SERVING
        new.state = State.SERVING
        self._accept_text(slot, new)
        try:
            slot.pid_file.write(new.pid)
        except OSError as problem:
            log(None, "core.error", 0, "Cannot write pid file; file='%s', error='%s'",
                (slot.pid_file.path, problem.strerror))
        self._listeners.adjust(new.serial)
        self._workers.send(new, "go", handover=slot.handed_over)
        slot.handed_over = {}
        if old is not None:
            self._listeners.release(old.serial)
            self._workers.kill_later(old, self._options.drain_timeout)
        if slot.crashed is not None:
            self._listeners.release(slot.crashed.serial)
            slot.crashed = None
        self._questions.put_waiting(slot)

    @staticmethod
    def _accept_text(slot: Slot, new: Handle) -> None:
        """From now on replacements of this slot load the text that this worker has loaded."""
        if new.text is not None:
            if slot.text is not None:
                os.close(slot.text)
            slot.text, new.text = new.text, None

    def _started(self) -> None:
        self._has_started = True
        self._start_report(EXIT_OK)
        self._reporter.attached = not self._options.mode.detached
        self._liveness.begin(self._notifier)
        self._notifier.send("READY=1")

    def _load_died(self, load: Load, reason: str) -> None:
        """A load failed without a worker having said why."""
        log(None, "core.error", 0, "Loading the policy failed; policy_file='%s', generation='%d', error='%s'",
            (self._options.policy, load.generation, reason))
        if load.purpose is Purpose.INITIAL and self._options.syslog:
            self._reporter(f"Loading the policy failed; error='{reason}'")   # who typed the command reads no syslog
        self._load_failed(load, EXIT_SETUP, reason)

    def _load_failed(self, load: Load, status: int, reason: str) -> None:
        load.cancel_timers()
        self._loads.remove(load)
        for slot in load.slots:
            failed, slot.successor = slot.successor, None
            if failed is not None and failed in self._workers:
                self._workers.end(failed, within_s=0)
        if load.purpose is Purpose.INITIAL:
            log(None, "core.error", 0, "Error loading initial policy, exiting;")
            self._exit_status = status
        elif load.purpose is Purpose.RELOAD:
            self._reload_failed(reason)
        else:
            self._restart_failed(load.slots[0], reason)
        self._next_reload()

    def _reload_failed(self, reason: str) -> None:
        log(None, "core.error", 0, "Error reloading policy, reverting to old;")
        self._notifier.send("READY=1")
        for slot in self._slots:                 # whose restart the reload was to replace
            if slot.phase is Phase.CRASHED:
                self._restart_later(slot)
        self._reloads.ended(Outcome(False, reason))
        self._tell_info()

    def _next_reload(self) -> None:
        is_busy = self._loads or self._reloads.under_way or self._stopping
        if self._reloads.wanted and not is_busy and self._exit_status is None:
            self._begin_reload()

    def _begin_reload(self) -> None:
        self._reloads.begun()
        log(None, "core.info", 0, "Reloading policy; policy_file='%s', instance_name='%s'",
            (self._options.policy, self._options.instance))
        for slot in self._slots:                 # begun anew if the reload fails, for whatever reason
            if slot.restart_timer is not None:
                slot.restart_timer.cancel()
                slot.restart_timer = None
        replaced = replaced_program()
        if replaced is not None:
            log(None, "core.error", 0, "%s", (replaced,))
            self._reload_failed(replaced)
            return
        self._notifier.send("RELOADING=1")
        self._begin_load(Purpose.RELOAD, self._slots)

    def _tell_info(self) -> None:
        """Let the workers publish what only the master knows."""
        generations = len({handle.generation for handle in self._workers
                           if handle.state in (State.SERVING, State.DRAINING)})
        load_started = min((int(load.began) for load in self._loads), default=0)
        for handle in self._serving():
            self._workers.send(handle, "info", leaves={
                "policy__load_started": load_started,
                "policy__generations": generations, "reload_failures": self._reloads.failures,
                "last_error": self._reloads.last_error})

    # ---- what the control socket asks for (control.Actions)

    def ask(self, slot: Slot, line: str, done: Done) -> None:
        self._questions.ask(slot, line, done)

    def stop_session(self, slot: Slot, session_id: str, done: Done) -> None:
        self._questions.stop_session(slot, session_id, done)

    def await_reload(self, done: Callable[[Outcome], None]) -> None:
        self._reloads.when_ended(done)

    def switch_deadlock_check(self, on: bool | None) -> bool:
        if on is not None:
            self._liveness.switch(on)
        return self._liveness.enabled

    def reload(self, revoke: bool = False) -> None:
        """Load the policy again; while a load is under way, once more after it."""
        if not self._stopping:
            self._reloads.want(revoke)
            for load in self._loads:
                self._abandon_later(load)
            self._next_reload()

    # ---- the end of workers

    def stop(self, status: int, urgent: bool = False) -> None:
        """End every worker, then the instance with this status.  A second, urgent order does not wait."""
        if not self._stopping:
            self._exit_status = status
            self._notifier.send("STOPPING=1")
        self._stopping = True
        for load in self._loads:
            load.cancel_timers()
        self._loads.clear()
        self._reloads.give_up("the instance is being stopped")
        for handle in list(self._workers):
            self._workers.end(handle, 0 if urgent else self._options.shutdown_grace)

    def _gone(self, handle: Handle, status: int) -> None:
        """A worker has ended.

        There is no way back from a switch: a successor that ends in it has crashed when the switch is done.
        """
        slot = handle.slot
        load = self._load_of(handle)
        if slot.serving is handle and not self._stopping:
            slot.serving = None
            if slot.phase is Phase.SERVING:
                self._crashed(handle, status)
            elif slot.phase is Phase.HANDING_OVER:       # it cannot any more
                self._has_handed_over(slot)
        elif load is not None and slot.successor is handle and load.is_switching:
            handle.early_end = status
            self._accept_text(slot, handle)
            return
        elif load is not None and slot.successor is handle:
            slot.successor = None
            self._load_died(load, _how_it_ended(status))
        if slot.crashed is not handle:
            self._listeners.release(handle.serial)
        self._tell_info()

    # ---- crashes

    def _crashed(self, handle: Handle, status: int) -> None:
        """A worker that served has ended; decide what becomes of its slot."""
        slot = handle.slot
        slot.phase = Phase.CRASHED
        # Status 0 is a crash too: a worker that may end has been told so, or has told us of quit().
        reason = ("deadlock" if handle.hung else "signal" if os.WIFSIGNALED(status) else "failure")
        budget = self._budgets[slot]
        restarting = self._options.mode.restarts and not budget.exhausted
        self._failure_hook.run(slot.name, slot.pid_file.path, _HOOK_REASON[reason], _detail(reason, status), restarting)
        if restarting:
            self._reporter(f"Daemon exited due to a {reason}, restarting; exitcode='{status}'")
            slot.crashed = handle
            budget.started()
            self._restart_later(slot)
        else:
            self._reporter(f"Daemon exited due to a {reason}, not restarting; exitcode='{status}', "
                           f"restart_count='{budget.count}'")
            self._give_up(slot)

    def _restart_later(self, slot: Slot) -> None:
        def restart() -> None:
            slot.restart_timer = None
            if not self._stopping and slot.successor is None:
                self._begin_load(Purpose.RESTART, [slot])

        if slot.successor is None:               # else a reload replaces it anyway
            slot.restart_timer = self._timers.after(RESTART_DELAY_S, restart)

    def _restart_failed(self, slot: Slot, reason: str) -> None:
        """What the policy needs is gone, perhaps for a moment: say that nobody serves, and try again."""
        budget = self._budgets[slot]
        log(None, "core.error", 0, "The policy in force cannot be loaded again, nobody serves for this process; "
            "process='%s', policy_file='%s', error='%s', retried='%s'",
            (slot.name, self._options.policy, reason, "no" if budget.exhausted else "yes"))
        if budget.exhausted:
            self._reporter(f"Daemon exited but not restarting; restart_count='{budget.count}'")
            self._give_up(slot)
        else:
            budget.started()
            self._restart_later(slot)

    def _give_up(self, slot: Slot) -> None:
        slot.phase = Phase.GIVEN_UP
        slot.pid_file.remove()
        if slot.crashed is not None:
            self._listeners.release(slot.crashed.serial)
            slot.crashed = None
        if all(one.phase is Phase.GIVEN_UP for one in self._slots):
            self.stop(EXIT_SETUP)

    # ---- signals

    def _take_signals(self, events: int) -> None:
        for number in self._signals.arrived():
            if number == signal.SIGCHLD:
                self._workers.reap()
            elif number == signal.SIGHUP:
                self.reload()
            elif number == signal.SIGUSR1:
                self._shift_verbosity(1)
            elif number == signal.SIGUSR2:
                self._shift_verbosity(-1)
            else:
                self.stop(EXIT_OK, urgent=self._stopping)

    def _shift_verbosity(self, change: int) -> None:
        """Every worker changes and says so; we change in silence."""
        present = Log.current_filter()
        Log.set_filter(Log.Filter(min(max(present.verbosity + change, 0), 10), present.spec))
        for handle in self._serving():
            self._workers.send(handle, "verbosity", change=change)


_HOOK_REASON = {"deadlock": "deadlock detected", "signal": "signalled", "failure": "non-zero exit code"}


def _how_it_ended(status: int) -> str:
    """What to tell of a worker that ended while it loaded, without a reason of its own."""
    if os.WIFSIGNALED(status):
        return f"worker ended by signal {os.WTERMSIG(status)} while loading"
    return f"worker ended with status {os.WEXITSTATUS(status)} while loading"


def _detail(reason: str, status: int) -> int | None:
    if reason == "signal":
        return os.WTERMSIG(status)
    return os.WEXITSTATUS(status) if reason == "failure" else None


def _shown(stamp: int) -> str:
    """Return epoch seconds as the log shows them."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(stamp))


def version() -> str:
    """The version as the log shows it: major number, then all of it."""
    return f"{Zorp.__version__.partition('.')[0]} ({Zorp.__version__})"
