"""What the master knows: virtual processes, their workers, and loads of the policy under way.

Data only; Zorp.runtime.master moves it.  The states of a worker and who may follow whom:

    LOADING -> LOADED -> SERVING -> DRAINING -> gone
    LOADING -> FAILED -> gone;  any of them -> STOPPING -> gone;  any of them -> gone (a crash)
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import time
from collections.abc import Callable

from Zorp.process.timers import Timer
from Zorp.runtime.channel import Channel
from Zorp.runtime.pidfile import PidFile


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
    """One worker process.  Two questions to it never share a number."""

    pid: int
    serial: int                  # unique; who uses which listener
    slot: Slot
    generation: int
    channel: Channel
    last_words: int              # descriptor of what a fatal signal makes it write
    state: State = State.LOADING
    kill_timer: Timer | None = None
    unanswered: dict[int, Callable[[str | None], None]] = dataclasses.field(default_factory=dict)
    pinged: bool = False         # a ping is out and not answered
    hung: bool = False           # found not to answer; being killed


@dataclasses.dataclass(eq=False)
class Slot:
    """One virtual process: NAME, or NAME#k."""

    name: str
    is_master: bool
    pid_file: PidFile
    serving: Handle | None = None
    successor: Handle | None = None
    handed_over: dict = dataclasses.field(default_factory=dict)
    crashed: Handle | None = None         # its listeners stay open until the next worker serves
    given_up: bool = False
    restart_timer: Timer | None = None
    questions: collections.deque = dataclasses.field(default_factory=collections.deque)


class Purpose(enum.Enum):
    """Why a policy is loaded."""

    INITIAL = "initial"
    RELOAD = "reload"
    RESTART = "restart"


@dataclasses.dataclass(eq=False)
class Load:
    """One attempt to bring successors into service."""

    purpose: Purpose
    generation: int
    slots: list[Slot]
    deadline: Timer | None = None
    revoke: bool = False         # sessions of older policies that this one refuses are to be ended
    began: float = dataclasses.field(default_factory=time.time)      # epoch seconds
    abandon_timer: Timer | None = None   # runs when a newer order waits
    file_stamp: int = -1         # modification time of the policy file that was loaded, epoch seconds
    waiting_for_handover: set[Slot] = dataclasses.field(default_factory=set)

    @property
    def is_reading(self) -> bool:
        """True while a worker still loads the policy."""
        return any(slot.successor is not None and slot.successor.state is State.LOADING for slot in self.slots)

    def cancel_timers(self) -> None:
        for timer in (self.deadline, self.abandon_timer):
            if timer is not None:
                timer.cancel()
