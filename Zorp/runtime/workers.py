"""The worker processes of a master: made, heard, told, ended.

Theory of operation
    A worker is forked from the single thread of the master and talks to it over a channel.
    What it says goes to take(handle, message); its end, after what it said last, to
    gone(handle, wait status).  What a slow worker does not take waits and is sent again later.

    What each worker is for, and what its end means, is the business of Zorp.runtime.master.

For the loop of the master.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import selectors
import signal
import sys
from collections.abc import Callable, Iterator

from Zorp import Log
from Zorp.Log import log
from Zorp.process.timers import Timers
from Zorp.runtime import channel as channels
from Zorp.runtime.channel import ChannelClosed, Message
from Zorp.runtime.logsetup import LogSetup
from Zorp.runtime.options import Options
from Zorp.runtime.slots import Handle, Slot, State
from Zorp.runtime.texts import AcceptedText
from Zorp.runtime.worker import EXIT_SETUP, Identity, Worker, die_with_parent

KILL_AFTER_S = 2.0               # from the order to end to SIGKILL
_LAST_WORDS_BYTES = 32_768
_CHANNEL_FLUSH_S = 0.05


class CannotStart(Exception):
    """No process can be made now: descriptors, processes or memory are used up; `str()` is the reason."""


class Workers:
    """See the module's text; iterating gives the handles of those that live."""

    def __init__(self, options: Options, selector: selectors.BaseSelector, timers: Timers, log_setup: LogSetup,
                 take: Callable[[Handle, Message], None], gone: Callable[[Handle, int], None],
                 let_go: Callable[[], None]) -> None:
        """let_go: called in a new worker, closes what is the master's alone."""
        self._options = options
        self._selector = selector
        self._timers = timers
        self._log_setup = log_setup
        self._take = take
        self._gone = gone
        self._let_go = let_go
        self._by_pid: dict[int, Handle] = {}
        self._serial = 0

    def __iter__(self) -> Iterator[Handle]:
        return iter(list(self._by_pid.values()))

    def __len__(self) -> int:
        return len(self._by_pid)

    # ---- the beginning

    def start(self, slot: Slot, generation: int, initial: bool, text: int | None = None) -> Handle:
        """Fork a worker of this generation, which begins to load.  Raises CannotStart.

        text: descriptor of the sealed text to load; None: what is on disk.
        """
        identity = Identity(name=slot.name, is_master=slot.is_master, generation=generation, initial=initial)
        with contextlib.ExitStack() as opened:
            try:
                ours, theirs = channels.pair()
                opened.callback(ours.close)
                opened.callback(theirs.close)
                last_words = os.memfd_create("last words")
                opened.callback(os.close, last_words)
                pid = self._fork(identity, ours, theirs, last_words, text)
                opened.callback(os.kill, pid, signal.SIGKILL)
                self._serial += 1
                handle = Handle(pid, self._serial, slot, generation, ours, last_words)
                self._selector.register(ours, selectors.EVENT_READ, lambda events: self._hear(handle))
            except OSError as problem:
                raise CannotStart(f"no process can be started: {problem.strerror}") from None
            opened.pop_all()
        theirs.close()
        self._by_pid[pid] = handle
        return handle

    def _fork(self, identity: Identity, ours: channels.Channel, theirs: channels.Channel, last_words: int,
              text: int | None) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()                          # keeps the pages shared when the child collects
        master_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            faulthandler.enable(last_words)
            self._become_worker(identity, ours, theirs, master_pid, text)
        return pid

    def _become_worker(self, identity: Identity, ours: channels.Channel, theirs: channels.Channel,
                       master_pid: int, text: int | None) -> None:
        """In the child: let go of everything that is the master's, then live; never returns."""
        status = EXIT_SETUP
        try:
            die_with_parent(master_pid)
            os.setpgid(0, 0)                 # a terminal's ^C is the master's business
            accepted = None if text is None else AcceptedText.unseal(text)
            self._let_go()
            ours.close()
            for handle in self._by_pid.values():
                handle.channel.close()
                os.close(handle.last_words)
                if handle.text is not None:
                    os.close(handle.text)
            status = Worker(self._options, identity, theirs, self._log_setup, accepted).run()
        except BaseException:
            Log.log_exception(None, 0)
        finally:
            self._log_setup.drain()
            with contextlib.suppress(Exception):     # a policy may have put anything there
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    # ---- messages

    def send(self, handle: Handle, kind: str, **fields) -> None:
        """Tell a worker something; nothing happens when it does not listen any more."""
        if handle.channel.closed:
            return
        has_timer = handle.channel.has_waiting
        try:
            handle.channel.send(kind, **fields)
        except ChannelClosed:                    # later: whoever calls this expects no message now
            self._timers.after(0, lambda: self._hear_out(handle))
            return
        if not has_timer:
            self._flush_later(handle)

    def _flush_later(self, handle: Handle) -> None:
        if handle.channel.has_waiting:
            self._timers.after(_CHANNEL_FLUSH_S, lambda: self._flush(handle))

    def _flush(self, handle: Handle) -> None:
        if not handle.channel.closed:
            with contextlib.suppress(ChannelClosed):
                handle.channel.flush()
            self._flush_later(handle)

    def _hear(self, handle: Handle) -> None:
        try:
            while (message := handle.channel.receive()) is not None:
                self._take(handle, message)
        except ChannelClosed:
            self._hang_up(handle)
        except Exception:                        # ours, not the worker's; a new worker is the best start over
            Log.log_exception(None, 0)
            self._hang_up(handle)

    def _hear_out(self, handle: Handle) -> None:
        """It does not listen any more: take what it has said, then hang up."""
        if not handle.channel.closed:
            self._hear(handle)                   # quit() of a policy, the reason of a failure, a handover, an answer
        self._hang_up(handle)

    def _hang_up(self, handle: Handle) -> None:
        """The worker's end is closed: it has ended or is about to; SIGCHLD tells the rest."""
        if handle.channel.closed:
            return
        self._selector.unregister(handle.channel)
        handle.channel.close()
        unanswered, handle.unanswered = handle.unanswered, {}
        for done in unanswered.values():
            done(None)

    # ---- the end

    def end(self, handle: Handle, within_s: float) -> None:
        """Let it end in its own way; one that is loading does not listen, and has nothing to lose.

        The policy that is in force when the instance stops cleans up, and no other.
        """
        if handle.state is State.LOADING:
            self._kill(handle)
        handle.state = State.STOPPING
        self.send(handle, "stop", within_s=within_s, is_in_force=handle.slot.serving is handle)
        self.kill_later(handle, within_s)

    def kill_later(self, handle: Handle, within_s: float) -> None:
        """Kill it when it still lives a moment after it should have ended."""
        if handle.kill_timer is not None:
            handle.kill_timer.cancel()
        handle.kill_timer = self._timers.after(within_s + KILL_AFTER_S, lambda: self._kill(handle))

    def _kill(self, handle: Handle) -> None:
        if handle.pid in self._by_pid:
            os.kill(handle.pid, signal.SIGKILL)

    def reap(self) -> None:
        """SIGCHLD has come: see who has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            handle = self._by_pid.pop(pid, None)
            if handle is not None:
                self._ended(handle, status)

    def _ended(self, handle: Handle, status: int) -> None:
        self._hear_out(handle)
        _log_last_words(handle, status)
        if handle.kill_timer is not None:
            handle.kill_timer.cancel()
        self._gone(handle, status)
        if handle.text is not None:          # not accepted
            os.close(handle.text)


def _log_last_words(handle: Handle, status: int) -> None:
    """The stacks that a worker left behind when a fatal signal ended it."""
    with open(handle.last_words, "rb") as file:
        file.seek(0)
        lines = file.read(_LAST_WORDS_BYTES).decode("utf-8", "replace").splitlines()
    if lines and os.WIFSIGNALED(status):
        log(None, "core.error", 0, "Signal received, stackdump follows; signo='%d', pid='%d'",
            (os.WTERMSIG(status), handle.pid))
        for line in lines:
            log(None, "core.error", 0, "Stack: %s", (line,))
