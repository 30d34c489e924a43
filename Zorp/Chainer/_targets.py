"""Chainers for several servers: who is first, who is down, who is next.

    Service("mail", SmtpProxy, router=DirectedRouter((mx1, mx2)), chainer=FailoverChainer())

Theory of operation
    The candidates are session.target_address.  chainParent() asks getNextTarget() for one
    after the other until connectTarget() gives a stream, and tells disableTarget() about those
    that did not.

    One walk through the candidates is a round.  A round begins at getFirstTargetIndex() and
    goes around; what is left of it is kept on the session (chainer_remaining), with the
    numbers that sites know: chainer_first_attempt, chainer_current_host, chainer_restart,
    chainer_targets_enumerated.  Every chainParent() begins a round of its own, so a reconnect
    of the same session selects anew.

    StateBasedChainer remembers for `timeout_state` which targets did not answer and passes them
    over.  When a round is used up it forgets what it knows about its own candidates and makes a
    second one, so each is tried at least once whatever other sessions found; then it gives up.

    The memory is shared by all sessions and services of the chainer object, by address and
    port; it ends with the process.

Deviations
    Rotation counts connections, not attempts.  Forgetting concerns the session's own targets
    only.  After giving up everything is as for a new session, so a third attempt does not hang.
"""

from __future__ import annotations

import math

from Zorp.Cache import TimedCache
from Zorp.Chainer._connect import ConnectChainer, _is_stopping, _no_destination
from Zorp.Chainer._state import ConnectionCounts, Rotation, index_of_least
from Zorp.Constants import CORE_MESSAGE, FALSE, TRUE, ZD_PROTO_AUTO
from Zorp.Exceptions import DACException
from Zorp.language import arguments
from Zorp.Log import log

_DOWN_MS = 60_000


def _target_key(target):
    """Return what tells targets apart in shared state: address and port."""
    return str(target)


class MultiTargetChainer(ConnectChainer):
    """Tries the targets of the session in turn until one answers; the next connection begins at the next one.

    Arguments: see ConnectChainer; timeout_connect counts per attempt.

    next_after_refusal: a class attribute for sites; TRUE: a target that access control forbids
    is passed over; FALSE (default): it ends the attempt with DACException.
    """

    next_after_refusal = FALSE

    def __init__(self, protocol=ZD_PROTO_AUTO, timeout_connect=None, proxy_protocol=0):
        super().__init__(protocol, timeout_connect, proxy_protocol)
        self._rotation = Rotation()

    @property
    def connection_count(self):
        """How many connections began so far, where the rotation counts them."""
        return self._rotation.count

    def chainParent(self, session):
        """Connect to the first target that answers; return a Stream or None."""
        if self._uses_connect_server(session):
            return self._call_connect_server(session)
        session.chainer_iterating = True
        try:
            self.restart(session)
            return self._try_targets(session)
        finally:
            session.chainer_iterating = False
            self.restart(session)

    def restart(self, session):
        """Make the next getNextTarget() of the session begin a new round."""
        session.chainer_restart = TRUE
        session.chainer_targets_enumerated = 0

    def getFirstTargetIndex(self, session):
        """Return the index where a round begins; asked once per connection."""
        return self._rotation.next_index(len(session.target_address))

    def getNextTarget(self, session):
        """Return (local address or None, target), (None, None) when all were tried."""
        return self._advance(session, self._pick)

    def disableTarget(self, session, target_local, target_remote):
        """Take note that a target did not answer."""

    def _try_targets(self, session):
        refusal = None
        local, remote = self._next_target(session)
        if remote is None and not session.target_address:
            return _no_destination(session)
        while remote is not None:
            stream, refusal = self._try_target(session, local, remote, refusal)
            if stream is not None or _is_stopping(session):
                return stream
            local, remote = self._next_target(session)
        if refusal is not None:
            raise refusal
        return None

    def _try_target(self, session, local, remote, refusal):
        """Return (stream or None, the last refusal of access control or None)."""
        try:
            stream = self.connectTarget(session, local, remote)
        except DACException as problem:
            if not self.next_after_refusal:
                raise
            return None, problem
        if stream is None and not _is_stopping(session):
            self.disableTarget(session, local, remote)
        return stream, refusal

    def _advance(self, session, pick):
        """Return the next target as getNextTarget() does; pick(targets, indices) chooses among the rest."""
        targets = session.target_address
        if not targets:
            return None, None
        index, remaining = pick(targets, self._remaining(session, targets))
        if index is None and self._begin_next_round(session, targets):
            index, remaining = pick(targets, _round_from(session.chainer_first_attempt, len(targets)))
        session.chainer_remaining = remaining
        if index is None:
            return None, None
        session.chainer_current_host = index
        return session.target_local, targets[index]

    def _remaining(self, session, targets):
        """Return the indices that the session's round has left; a new round when there is none."""
        own = vars(session)
        if not own.get("chainer_restart", TRUE) and own.get("chainer_round_targets") is targets:
            return own["chainer_remaining"]
        session.chainer_round_targets = targets        # other targets are another round
        first = self.getFirstTargetIndex(session) % len(targets)
        session.chainer_restart = FALSE
        session.chainer_first_attempt = first
        return _round_from(first, len(targets))

    def _pick(self, targets, remaining):
        """Return (the chosen index or None, the indices left in the round)."""
        return (remaining[0], remaining[1:]) if remaining else (None, ())

    def _begin_next_round(self, session, targets):
        """Return whether there is another round after one that is used up."""
        return False


def _round_from(first, size):
    return tuple((first + step) % size for step in range(size))


class StateBasedChainer(MultiTargetChainer):
    """Remembers targets that do not answer and passes them over.

    Arguments:
        protocol, timeout_connect, proxy_protocol: see MultiTargetChainer.
        timeout_state: milliseconds a target stays marked as down; None, 0: 60000; kept as
            whole seconds, rounded up.
    """

    def __init__(self, protocol=ZD_PROTO_AUTO, timeout_connect=None, timeout_state=None, proxy_protocol=0):
        super().__init__(protocol, timeout_connect, proxy_protocol)
        down_ms = arguments.milliseconds("a chainer", "timeout_state", timeout_state) or _DOWN_MS
        self.state = TimedCache("chainer-state", math.ceil(down_ms / 1000), update_stamp=FALSE)

    def disableTarget(self, session, target_local, target_remote):
        """Remember that a target is down."""
        log(session.session_id, CORE_MESSAGE, 4, "Destination is down, keeping state; remote='%s'", (target_remote,))
        key = _target_key(target_remote)
        self.state.store(key, None)               # an entry that is there already would keep its age
        self.state.store(key, TRUE)

    def _pick(self, targets, remaining):
        while remaining and self._is_passed_over(targets[remaining[0]]):
            remaining = remaining[1:]
        return super()._pick(targets, remaining)

    def _is_passed_over(self, target):
        if not self.state.lookup(_target_key(target)):
            return False
        log(None, CORE_MESSAGE, 4, "Destination is down, skipping; remote='%s'", (target,))
        return True

    def _begin_next_round(self, session, targets):
        rounds = vars(session).get("chainer_targets_enumerated", 0) + 1
        if rounds > 1:
            log(None, CORE_MESSAGE, 4, "All destinations are down for two full iterations, giving up;")
            self.restart(session)
            return False
        session.chainer_targets_enumerated = rounds
        log(None, CORE_MESSAGE, 4, "All destinations are down, clearing cache and trying again;")
        for target in targets:
            self.state.store(_target_key(target), None)
        return True


class RoundRobinChainer(StateBasedChainer):
    """Each connection begins at the next target; those that are down are passed over.

    Arguments: see StateBasedChainer.
    """


class AvailabilityChainer(MultiTargetChainer):
    """Begins at the first target that is available.

    Arguments: see ConnectChainer.

    isAvailable() is what a site overrides that knows, from a checker of its own, which servers
    are up; without it every target counts as available.
    """

    def getFirstTargetIndex(self, session):
        """Return 0: the targets are in order of preference."""
        return 0

    def isAvailable(self, target):
        """Return whether the target (a SockAddr) is up; for a site's checker."""
        return True

    def _pick(self, targets, remaining):
        while remaining and not self.isAvailable(targets[remaining[0]]):
            remaining = remaining[1:]
        return super()._pick(targets, remaining)


class RoundRobinAvailabilityChainer(AvailabilityChainer):
    """Each connection begins at the next available target.

    Arguments: see ConnectChainer; isAvailable(): see AvailabilityChainer.
    """

    def getFirstTargetIndex(self, session):
        """Return the index after that of the last connection."""
        return MultiTargetChainer.getFirstTargetIndex(self, session)


class _Stateless(StateBasedChainer):
    """Base of chainers whose getNextTarget() gives the same answer each time it is asked from outside."""

    def getNextTarget(self, session):
        """Return (local address or None, target), (None, None) when all were tried."""
        self._forget_round(session)
        return super().getNextTarget(session)

    def _forget_round(self, session):
        if not vars(session).get("chainer_iterating"):
            session.chainer_restart = TRUE


class SourceIPBasedChainer(_Stateless):
    """The same client always meets the same target: its address, as a number, modulo their number.

    While that one is down the next that is not serves.  Arguments: see StateBasedChainer.
    """

    def getFirstTargetIndex(self, session):
        """Return the index that belongs to the client's address."""
        return session.owner.client_address.ip_int % len(session.target_address)


class LeastConnectionChainer(_Stateless):
    """The target with the fewest connections, the first of equals.

    Arguments: see StateBasedChainer.

    A target is counted from the moment it is handed out until its stream is closed, or the
    connect fails; by address and port of the target itself, whatever DNAT makes of it.
    """

    def __init__(self, protocol=ZD_PROTO_AUTO, timeout_connect=None, timeout_state=None, proxy_protocol=0):
        super().__init__(protocol, timeout_connect, timeout_state, proxy_protocol)
        self._counts = ConnectionCounts()

    def getFirstTargetIndex(self, session):
        """Return 0: equals are taken in their order."""
        return 0

    def getNextTarget(self, session, get_conn_count=None):
        """Return (local address or None, target), (None, None) when all were tried.

        get_conn_count: a function of (target addresses, index) that gives the number of
        connections; without it the chainer counts by itself.
        """
        self._forget_round(session)
        if get_conn_count is None:
            local, target = self._advance(session, self._pick_and_count)
            session.chainer_counted_target = None if target is None else _target_key(target)
            return local, target
        return self._advance(session, lambda targets, remaining: self._pick_by(get_conn_count, targets, remaining))

    def chainParent(self, session):
        """Connect to the target with the fewest connections that answers; return a Stream or None."""
        stream = None
        try:
            stream = super().chainParent(session)
        finally:
            counted = _take_counted(session)
            if counted is not None and stream is None:
                self._counts.leave(counted)
        if counted is not None:
            stream.on_close(lambda: self._counts.leave(counted))
        return stream

    def _try_target(self, session, local, remote, refusal):
        stream, refusal = super()._try_target(session, local, remote, refusal)
        if stream is None and (counted := _take_counted(session)) is not None:
            self._counts.leave(counted)
        return stream, refusal

    def _pick_and_count(self, targets, remaining):
        remaining = self._without_down(targets, remaining)
        if not remaining:
            return None, ()
        place = self._counts.enter_least([_target_key(targets[index]) for index in remaining])
        return _taken_out(remaining, place)

    def _pick_by(self, get_conn_count, targets, remaining):
        remaining = self._without_down(targets, remaining)
        if not remaining:
            return None, ()
        place = index_of_least(len(remaining), lambda i: get_conn_count(targets, remaining[i]))
        return _taken_out(remaining, place)

    def _without_down(self, targets, remaining):
        return tuple(index for index in remaining if not self._is_passed_over(targets[index]))


def _taken_out(indices, place):
    return indices[place], indices[:place] + indices[place + 1:]


def _take_counted(session):
    """Return the key of the target that the session was counted for, once."""
    counted = vars(session).get("chainer_counted_target")
    if counted is not None:
        session.chainer_counted_target = None
    return counted
