"""What the master knows: virtual processes, their workers, and loads of the policy under way.

Data only; Zorp.runtime.master moves it.  The states of a worker and who may follow whom:

    LOADING -> LOADED -> SERVING -> DRAINING -> gone
    LOADING -> FAILED -> gone;  any of them -> STOPPING -> gone;  any of them -> gone (a crash)

The phases of a virtual process; what the end of the worker that served it means in each:

    phase           the worker ends         or this happens
    EMPTY           -                       the first load is done -> SERVING
    SERVING         a crash -> CRASHED      a switch begins -> HANDING_OVER
    HANDING_OVER    -> HANDED_OVER, with    its answer comes -> HANDED_OVER;  the switch does not
                    nothing to hand over    wait any longer -> SERVING (the successor)
    HANDED_OVER     as it should            every slot of the load is here -> SERVING (the successor, which has
                                            crashed there if it ended before)
    CRASHED         -                       its successor is ready -> SERVING;  too many crashes -> GIVEN_UP
    GIVEN_UP        -                       a reload succeeds -> SERVING
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
    text: int | None = None      # descriptor of the policy's sealed text, until it is accepted
    digests: dict[str, str] = dataclasses.field(default_factory=dict)    # of that text, by path
    state: State = State.LOADING
    kill_timer: Timer | None = None
    unanswered: dict[int, Callable[[str | None], None]] = dataclasses.field(default_factory=dict)
    pinged: bool = False         # a ping is out and not answered
    hung: bool = False           # found not to answer; being killed
    early_end: int | None = None    # wait status of one that ended in the switch that was to bring it into service


class Phase(enum.Enum):
    """Where a virtual process stands; see the module's text."""

    EMPTY = "empty"
    SERVING = "serving"
    HANDING_OVER = "handing over"
    HANDED_OVER = "handed over"
    CRASHED = "crashed"
    GIVEN_UP = "given up"


@dataclasses.dataclass(eq=False)
class Slot:
    """One virtual process: NAME, or NAME#k."""

    name: str
    is_master: bool
    pid_file: PidFile
    phase: Phase = Phase.EMPTY
    serving: Handle | None = None
    successor: Handle | None = None
    text: int | None = None               # descriptor of the sealed text of the policy in force, for replacements
    handed_over: dict = dataclasses.field(default_factory=dict)
    crashed: Handle | None = None         # its listeners stay open until the next worker serves
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
    began: float = dataclasses.field(default_factory=time.time)      # epoch seconds
    abandon_timer: Timer | None = None   # runs when a newer order waits
    file_stamp: int = -1         # modification time of the policy file that was loaded, epoch seconds

    @property
    def is_reading(self) -> bool:
        """True while a worker still loads the policy."""
        return any(slot.successor is not None and slot.successor.state is State.LOADING for slot in self.slots)

    @property
    def differing_files(self) -> list[str]:
        """The files that two of the successors have read with different content."""
        contents: dict[str, set[str]] = {}
        for slot in self.slots:
            for path, digest in slot.successor.digests.items():
                contents.setdefault(path, set()).add(digest)
        return [path for path, digests in contents.items() if len(digests) > 1]

    @property
    def is_handing_over(self) -> bool:
        """True while a predecessor has not answered the order to hand over."""
        return any(slot.phase is Phase.HANDING_OVER for slot in self.slots)

    @property
    def is_switching(self) -> bool:
        """True from the order to hand over until the successors serve."""
        return any(slot.phase in (Phase.HANDING_OVER, Phase.HANDED_OVER) for slot in self.slots)

    def cancel_timers(self) -> None:
        for timer in (self.deadline, self.abandon_timer):
            if timer is not None:
                timer.cancel()
