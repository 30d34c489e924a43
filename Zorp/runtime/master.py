"""The master: one per instance, keeps the workers, the listening sockets and the pid files.

Theory of operation
    A slot is a virtual process (NAME, or NAME#k).  It has a worker that serves, perhaps a
    successor that is loading, and workers that only finish their sessions.  Three things start
    successors, and all end in one step, _switch():

        the first start    every slot; a failure ends the instance with the worker's status
        a reload           every slot; a failure changes nothing
        a restart          the one slot whose worker crashed; a failure is retried

    The step: when every successor of the load has reported "loaded", the old workers are told
    to retire and answer with session numbers and counters; then the successors are told to go.
    The listening sockets belong to the master and are open all the time.

    The master never loads a policy, never reads from the network and has one thread, so that
    fork() is safe at any moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import gc
import os
import selectors
import signal
import sys
from collections.abc import Callable

from Zorp.Log import log
from Zorp.runtime import channel as channels
from Zorp.runtime.channel import Channel, ChannelClosed, Message
from Zorp.runtime.listeners import ListenError, ListenerTable, ListenSpec
from Zorp.runtime.options import Options
from Zorp.runtime.pidfile import PidFile
from Zorp.runtime.signals import SignalPipe
from Zorp.runtime.timers import Timer, Timers
from Zorp.runtime.worker import EXIT_OK, EXIT_SETUP, Identity, Worker, die_with_parent

LOAD_DEADLINE_S = 300.0          # a policy that loads longer hangs
HANDOVER_DEADLINE_S = 5.0        # a worker that does not hand over in time is left behind
KILL_AFTER_S = 2.0               # from the order to end to SIGKILL

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class State(enum.Enum):
    """The life of a worker, seen from the master."""

    LOADING = "loading"
    LOADED = "loaded"            # waits for its predecessor's handover
    SERVING = "serving"
    DRAINING = "draining"        # finishes its sessions after a reload
    STOPPING = "stopping"        # told to end
    FAILED = "failed"            # could not load; about to exit


@dataclasses.dataclass(eq=False)
class Handle:
    """What the master knows of one worker process."""

    pid: int
    serial: int                  # unique; who uses which listener
    slot: Slot
    generation: int
    channel: Channel
    state: State = State.LOADING
    kill_timer: Timer | None = None


@dataclasses.dataclass(eq=False)
class Slot:
    """One virtual process."""

    name: str
    is_master: bool
    pid_file: PidFile
    serving: Handle | None = None
    successor: Handle | None = None
    handed_over: dict = dataclasses.field(default_factory=dict)


class Purpose(enum.Enum):
    INITIAL = "initial"
    RELOAD = "reload"
    RESTART = "restart"


@dataclasses.dataclass(eq=False)
class Load:
    """One attempt to bring successors into service."""

    purpose: Purpose
    generation: int
    slots: list[Slot]
    waiting_for_handover: set[Slot] = dataclasses.field(default_factory=set)
    deadline: Timer | None = None


class Master:
    """See the module's text.  run() returns the exit status of the instance."""

    def __init__(self, options: Options, slots: list[Slot], report_start: Callable[[int], None]) -> None:
        """report_start is called once, with 0 when the first policy serves."""
        self._options = options
        self._slots = slots
        self._report_start = report_start
        self._listeners = ListenerTable()
        self._workers: dict[int, Handle] = {}
        self._selector = selectors.DefaultSelector()
        self._timers = Timers()
        self._signals = SignalPipe(_SIGNALS)
        self._loads: list[Load] = []
        self._reload_again = False
        self._generation = 0
        self._serial = 0
        self._stopping = False
        self._exit_status: int | None = None

    def run(self) -> int:
        self._selector.register(self._signals, selectors.EVENT_READ, self._take_signals)
        self._begin_load(Purpose.INITIAL, self._slots)
        while self._exit_status is None or self._workers:
            for key, _events in self._selector.select(self._timers.timeout()):
                key.data()
            self._timers.run_due()
        for slot in self._slots:
            slot.pid_file.remove()
        self._listeners.close()
        return self._exit_status

    # ---- starting workers

    def _begin_load(self, purpose: Purpose, slots: list[Slot]) -> None:
        self._generation += 1
        load = Load(purpose, self._generation, list(slots))
        self._loads.append(load)
        for slot in load.slots:
            slot.successor = self._fork(slot, load)
        load.deadline = self._timers.after(LOAD_DEADLINE_S, lambda: self._load_failed(
            load, EXIT_SETUP, f"loading took longer than {LOAD_DEADLINE_S:.0f} seconds"))

    def _fork(self, slot: Slot, load: Load) -> Handle:
        ours, theirs = channels.pair()
        identity = Identity(name=slot.name, is_master=slot.is_master, generation=load.generation,
                            initial=load.purpose is Purpose.INITIAL)
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()                          # keeps the pages shared when the child collects
        master_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(identity, ours, theirs, master_pid)
        theirs.close()
        self._serial += 1
        handle = Handle(pid, self._serial, slot, load.generation, ours)
        self._workers[pid] = handle
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._take_message(handle))
        return handle

    def _become_worker(self, identity: Identity, ours: Channel, theirs: Channel, master_pid: int) -> None:
        """In the child: let go of everything that is the master's, then live; never returns."""
        status = EXIT_SETUP
        try:
            die_with_parent(master_pid)
            os.setpgid(0, 0)                 # a terminal's ^C is the master's business
            self._signals.close()
            self._selector.close()
            self._listeners.close()
            ours.close()
            for handle in self._workers.values():
                handle.channel.close()
            for slot in self._slots:
                slot.pid_file.close()
            status = Worker(self._options, identity, theirs).run()
        finally:
            sys.stderr.flush()
            os._exit(status)

    # ---- messages

    def _take_message(self, handle: Handle) -> None:
        try:
            message = handle.channel.receive()
            if message is not None:
                getattr(self, f"_on_{message.kind}")(handle, message)
        except ChannelClosed:
            self._hang_up(handle)

    def _hang_up(self, handle: Handle) -> None:
        """The worker's end is closed: it has ended or is about to; SIGCHLD tells the rest."""
        if not handle.channel.closed:
            self._selector.unregister(handle.channel)
            handle.channel.close()

    def _send(self, handle: Handle, kind: str, **fields) -> None:
        try:
            handle.channel.send(kind, **fields)
        except ChannelClosed:
            self._hang_up(handle)
            return
        if handle.channel.has_waiting:
            self._timers.after(0.05, lambda: self._flush(handle))

    def _flush(self, handle: Handle) -> None:
        with contextlib.suppress(ChannelClosed):
            if not handle.channel.flush() and handle.pid in self._workers:
                self._timers.after(0.05, lambda: self._flush(handle))

    def _on_listen(self, handle: Handle, message: Message) -> None:
        try:
            sock = self._listeners.obtain(ListenSpec(**message["spec"]), handle.serial)
        except ListenError as problem:
            self._send(handle, "listener", error=problem.strerror, step=problem.step)
            return
        self._send(handle, "listener", descriptors=(sock.fileno(),))

    def _on_loaded(self, handle: Handle, message: Message) -> None:
        load = self._load_of(handle)
        if load is None:
            return
        handle.state = State.LOADED
        if all(slot.successor.state is State.LOADED for slot in load.slots):
            self._switch(load)

    def _on_failed(self, handle: Handle, message: Message) -> None:
        handle.state = State.FAILED
        load = self._load_of(handle)
        if load is not None:
            self._load_failed(load, message["status"], message["reason"])

    def _on_handover(self, handle: Handle, message: Message) -> None:
        handle.slot.handed_over = message["state"]
        for load in self._loads:
            if handle.slot in load.waiting_for_handover:
                load.waiting_for_handover.discard(handle.slot)
                if not load.waiting_for_handover:
                    self._finish_switch(load)
                return

    def _on_order(self, handle: Handle, message: Message) -> None:
        what = message["what"]
        if what == "reload":
            self.reload()
        elif what == "quit":
            self.stop(message["status"], urgent=True)
        elif not self._stopping or message["urgent"]:
            self.stop(EXIT_OK, urgent=message["urgent"])

    def _on_pong(self, handle: Handle, message: Message) -> None:
        """The worker's loop turns."""

    # ---- from one policy to the next

    def _load_of(self, handle: Handle) -> Load | None:
        return next((load for load in self._loads if load.generation == handle.generation), None)

    def _switch(self, load: Load) -> None:
        """Every successor is ready: let the predecessors hand over."""
        load.deadline.cancel()
        for slot in load.slots:
            if slot.serving is not None:
                load.waiting_for_handover.add(slot)
                slot.serving.state = State.DRAINING
                self._send(slot.serving, "retire", within_s=self._options.drain_timeout)
        if load.waiting_for_handover:
            load.deadline = self._timers.after(HANDOVER_DEADLINE_S, lambda: self._finish_switch(load))
        else:
            self._finish_switch(load)

    def _finish_switch(self, load: Load) -> None:
        load.deadline.cancel()
        self._loads.remove(load)
        for slot in load.slots:
            old, new = slot.serving, slot.successor
            slot.serving, slot.successor = new, None
            new.state = State.SERVING
            slot.pid_file.write(new.pid)
            self._send(new, "go", handover=slot.handed_over)
            slot.handed_over = {}
            if old is not None:
                self._listeners.release(old.serial)
        if load.purpose is Purpose.INITIAL:
            self._report_start(EXIT_OK)
        self._next_reload()

    def _load_failed(self, load: Load, status: int, reason: str) -> None:
        load.deadline.cancel()
        self._loads.remove(load)
        for slot in load.slots:
            failed, slot.successor = slot.successor, None
            if failed is not None and failed.pid in self._workers:
                self._end_worker(failed, within_s=0)
        if load.purpose is Purpose.INITIAL:
            log(None, "core.error", 0, "Error loading initial policy, exiting;")
            self._exit_status = status
        elif load.purpose is Purpose.RELOAD:
            log(None, "core.error", 0, "Error reloading policy, reverting to old;")
        self._next_reload()

    def reload(self) -> None:
        """Load the policy again; when a load is under way, once more after it."""
        if self._stopping or self._exit_status is not None:
            return
        if self._loads:
            self._reload_again = True
            return
        log(None, "core.info", 0, "Reloading policy; policy_file='%s', instance_name='%s'",
            (self._options.policy, self._options.instance))
        self._begin_load(Purpose.RELOAD, self._slots)

    def _next_reload(self) -> None:
        if self._reload_again and not self._loads:
            self._reload_again = False
            self.reload()

    # ---- the end

    def stop(self, status: int, urgent: bool = False) -> None:
        """End every worker, then the instance with this status.  A second, urgent order does not wait."""
        if not self._stopping:
            self._exit_status = status
        self._stopping = True
        for load in self._loads:
            load.deadline.cancel()
        self._loads.clear()
        for handle in list(self._workers.values()):
            self._end_worker(handle, 0 if urgent else self._options.shutdown_grace)

    def _end_worker(self, handle: Handle, within_s: float) -> None:
        handle.state = State.STOPPING
        self._send(handle, "stop", within_s=within_s)
        if handle.kill_timer is not None:
            handle.kill_timer.cancel()
        handle.kill_timer = self._timers.after(within_s + KILL_AFTER_S, lambda: self._kill(handle))

    def _kill(self, handle: Handle) -> None:
        if handle.pid in self._workers:
            os.kill(handle.pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._workers:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            handle = self._workers.pop(pid, None)
            if handle is not None:
                self._ended(handle, status)

    def _ended(self, handle: Handle, status: int) -> None:
        self._hang_up(handle)
        if handle.kill_timer is not None:
            handle.kill_timer.cancel()
        slot = handle.slot
        load = self._load_of(handle)
        if load is not None and slot.successor is handle:
            slot.successor = None
            self._load_failed(load, EXIT_SETUP, f"the process ended while loading, status {status}")
        elif slot.serving is handle and not self._stopping:
            slot.serving = None
            self._crashed(slot, status)
        if slot.serving is not handle:
            self._listeners.release(handle.serial)

    def _crashed(self, slot: Slot, status: int) -> None:
        log(None, "core.error", 0, "Worker ended; process='%s', status='%d'", (slot.name, status))
        self._begin_load(Purpose.RESTART, [slot])

    # ---- signals

    def _take_signals(self) -> None:
        for number in self._signals.arrived():
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGHUP:
                self.reload()
            elif number == signal.SIGUSR1:
                self._tell_all("verbosity", change=1)
            elif number == signal.SIGUSR2:
                self._tell_all("verbosity", change=-1)
            else:
                self.stop(EXIT_OK, urgent=self._stopping)

    def _tell_all(self, kind: str, **fields) -> None:
        for slot in self._slots:
            if slot.serving is not None:
                self._send(slot.serving, kind, **fields)


