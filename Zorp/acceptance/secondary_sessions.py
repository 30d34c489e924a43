"""Connections that join a proxy which runs already: the secondary sessions of Plug.

Theory of operation
    A proxy that wants company takes the first seat of a group with open(): it says which
    properties of its connection others must share (a mask), and how many may join.  A service
    that is about to start a proxy for a connection asks join() first: when a group of the same
    service and the same listener agrees with the connection in all properties of its mask and
    has room, the connection gets a seat there instead of a proxy of its own.  Whoever has a
    seat leaves it at its end; the last one to leave is told so, and the group is gone.

    The dispatcher has chosen the service before, by the same rules as for any connection:
    joining is no way around them.

Threads
    Any thread may call.  _groups_lock guards the table and every group.

Deviation
    The original was to ask at priority NORMAL, before a dispatcher chose the service.  Which
    service it is decides who may join, so the question comes after that choice.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable

SOURCE_ADDRESS, SOURCE_PORT, DESTINATION_ADDRESS, DESTINATION_PORT = 1, 2, 4, 8
ALL_PROPERTIES = SOURCE_ADDRESS | SOURCE_PORT | DESTINATION_ADDRESS | DESTINATION_PORT


@dataclasses.dataclass(slots=True, eq=False)
class _Group:
    """Sessions that share a proxy."""

    place: Hashable                  # where it is in the table: service, listener, mask and properties
    instance_id: int
    most: int                        # seats, the first one included
    taken: int = 0
    next_number: int = 0
    members: list[Seat] = dataclasses.field(default_factory=list)      # those that a newcomer can take after


class Seat:
    """The place of one session in a group; number 0 has the session that opened it."""

    __slots__ = ("_copy_state", "_group", "_table", "number", "state")

    def __init__(self, table: SecondarySessions, group: _Group, number: int, state: dict | None) -> None:
        self._table, self._group = table, group
        self.number = number
        self.state = state               # of a member when this seat was taken; None for the first
        self._copy_state: Callable[[], dict] | None = None

    @property
    def instance_id(self) -> int:
        """The instance number that all of the group share."""
        return self._group.instance_id

    def fill(self, copy_state: Callable[[], dict]) -> None:
        """The proxy of this seat is there; newcomers may take a copy of its state."""
        self._copy_state = copy_state
        self._table.fill(self._group, self)

    def copy_state(self) -> dict:
        """Return a copy of the state of this seat's proxy."""
        return self._copy_state()

    def leave(self) -> bool:
        """Give the seat up; True for the last one of the group."""
        return self._table.leave(self._group, self)


class SecondarySessions:
    """All groups of this process; see the module's text."""

    def __init__(self) -> None:
        self._groups_lock = threading.Lock()
        self._groups: dict[Hashable, list[_Group]] = {}
        self._masks: dict[Hashable, dict[int, int]] = {}     # service and listener: mask: groups

    def open(self, session, mask: int, most_others: int) -> Seat:
        """Return the first seat of a new group, for the connection of this master session."""
        place = _place(session, mask)
        with self._groups_lock:
            group = _Group(place, session.instance_id, most_others + 1, taken=1, next_number=1)
            self._groups.setdefault(place, []).append(group)
            masks = self._masks.setdefault(place[:2], {})
            masks[mask] = masks.get(mask, 0) + 1
            return Seat(self, group, 0, None)

    def join(self, session) -> Seat | None:
        """Return a seat for the connection of this master session; None when no group takes it."""
        if not self._groups:                 # nearly always
            return None
        with self._groups_lock:
            for mask in self._masks.get((id(session.service), id(session.client_listen)), ()):
                for group in self._groups.get(_place(session, mask), ()):
                    if group.members and group.taken < group.most:
                        seat = Seat(self, group, group.next_number, group.members[0].copy_state())
                        group.taken += 1
                        group.next_number += 1
                        return seat
        return None

    def fill(self, group: _Group, seat: Seat) -> None:
        """Make the proxy of a seat one that newcomers can take after."""
        with self._groups_lock:
            group.members.append(seat)

    def leave(self, group: _Group, seat: Seat) -> bool:
        """Give a seat up, once; True when the group is empty now."""
        with self._groups_lock:
            if seat in group.members:
                group.members.remove(seat)
            group.taken -= 1
            if group.taken:
                return False
            same = self._groups[group.place]
            same.remove(group)
            if not same:
                del self._groups[group.place]
            listener, mask = group.place[:2], group.place[2]
            masks = self._masks[listener]
            masks[mask] -= 1
            if not masks[mask]:
                del masks[mask]
            if not masks:
                del self._masks[listener]
            return True


def _place(session, mask: int) -> tuple:
    """Return what connections of one group have in common; service and listener live as long as this process."""
    return (id(session.service), id(session.client_listen), mask,
            *(value for bit, value in _properties(session) if mask & bit))


def _properties(session):
    client, wanted = session.client_address, session.client_local
    return ((SOURCE_ADDRESS, getattr(client, "ip_s", None)), (SOURCE_PORT, getattr(client, "port", 0)),
            (DESTINATION_ADDRESS, getattr(wanted, "ip_s", None)), (DESTINATION_PORT, getattr(wanted, "port", 0)))


secondary_sessions = SecondarySessions()
