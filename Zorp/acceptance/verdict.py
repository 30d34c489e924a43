"""How a connection ended, and which failure stands for which end.

Theory of operation
    Every master session carries one ConnectionVerdict, ACCEPTED until something says
    otherwise, and with it the reason in a few words; the connection summary prints its name,
    a structured one the reason, too.  Two places turn an exception into a verdict and a line of
    log: the accepting side (Zorp.Dispatch) and the server connect (Zorp.Proxy).  Both call
    refuse(), so that one table decides.  What else ends a connection calls conclude(), where
    the first reason stays.

    The table is searched from the top, the first class that fits wins.  An exception outside
    the table is a defect of ours or of the policy: its traceback goes to the log.  The same
    holds for children of RuntimeError (NotImplementedError, RecursionError): the fixed line of
    RuntimeError would not tell where they come from.
"""

from __future__ import annotations

from typing import NamedTuple

from Zorp.Constants import CORE_POLICY
from Zorp.Exceptions import (
    AAException,
    DACException,
    LicenseException,
    LimitException,
    MACException,
    ZoneException,
    ZorpException,
)
from Zorp.Log import log, log_exception

_NAMES = (
    "ACCEPTED",
    "DENIED_BY_POLICY",
    "DENIED_BY_LIMIT",
    "DENIED_BY_CONNECTION_FAIL",
    "DENIED_BY_UNKNOWN_FAIL",
    "ABORTED_BY_POLICY_ACTION",
    "INVALID_POLICY_CALL",
)


class ConnectionVerdict:
    """One of the seven ends of a connection; str() is its name, == compares by value.

    Raises ValueError for a number outside 0 to 6.
    """

    __slots__ = ("value",)

    (ACCEPTED, DENIED_BY_POLICY, DENIED_BY_LIMIT, DENIED_BY_CONNECTION_FAIL,
     DENIED_BY_UNKNOWN_FAIL, ABORTED_BY_POLICY_ACTION, INVALID_POLICY_CALL) = range(len(_NAMES))

    def __init__(self, verdict_value):
        if isinstance(verdict_value, ConnectionVerdict):
            verdict_value = verdict_value.value
        if verdict_value not in range(len(_NAMES)):
            raise ValueError(f"Invalid connection verdict value; value='{verdict_value}'")
        self.value = verdict_value

    def __eq__(self, other):
        return getattr(other, "value", other) == self.value

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(self.value)

    def __str__(self):
        return _NAMES[self.value]

    def __repr__(self):
        return f"ConnectionVerdict({self})"


ACCEPTED = ConnectionVerdict(ConnectionVerdict.ACCEPTED)
DENIED_BY_POLICY = ConnectionVerdict(ConnectionVerdict.DENIED_BY_POLICY)
DENIED_BY_LIMIT = ConnectionVerdict(ConnectionVerdict.DENIED_BY_LIMIT)
DENIED_BY_CONNECTION_FAIL = ConnectionVerdict(ConnectionVerdict.DENIED_BY_CONNECTION_FAIL)
DENIED_BY_UNKNOWN_FAIL = ConnectionVerdict(ConnectionVerdict.DENIED_BY_UNKNOWN_FAIL)
ABORTED_BY_POLICY_ACTION = ConnectionVerdict(ConnectionVerdict.ABORTED_BY_POLICY_ACTION)
INVALID_POLICY_CALL = ConnectionVerdict(ConnectionVerdict.INVALID_POLICY_CALL)


class Refusal(NamedTuple):
    """What one class of exceptions means for the connection it ends."""

    problem: type[BaseException]
    verdict: ConnectionVerdict
    text: str                    # written at core.policy(1) with the exception; "": its traceback is written


REFUSALS = (
    Refusal(ZoneException, DENIED_BY_POLICY, "Zone not found; info='%s'"),
    Refusal(DACException, DENIED_BY_POLICY, "DAC policy violation; info='%s'"),
    Refusal(MACException, DENIED_BY_POLICY, "MAC policy violation; info='%s'"),
    Refusal(AAException, DENIED_BY_POLICY, "Authentication failure; info='%s'"),
    Refusal(LimitException, DENIED_BY_LIMIT, "Connection over permitted limits; info='%s'"),
    Refusal(LicenseException, DENIED_BY_LIMIT,
            "Attempt to use an unlicensed component, or number of licensed hosts exceeded; info='%s'"),
    Refusal(RuntimeError, DENIED_BY_UNKNOWN_FAIL, "Unexpected runtime error occured; info='%s'"),
)
_UNKNOWN = Refusal(BaseException, DENIED_BY_UNKNOWN_FAIL, "")


def refuse(session, problem) -> None:
    """Set verdict and reason in the session's master and log why, as the table says.

    Call it while `problem` is being handled: an exception outside the table is logged with
    its traceback.
    """
    master = session.getMasterSession()
    refusal = _refusal_of(problem)
    master.verdict, master.refusal_reason = refusal.verdict, _reason_of(problem)
    if refusal.text:
        log(session.session_id, CORE_POLICY, 1, refusal.text, (str(problem),))
    if not refusal.text or (isinstance(problem, RuntimeError) and type(problem) is not RuntimeError):
        log_exception(session.session_id)


def conclude(session, verdict: ConnectionVerdict, reason: str = "") -> None:
    """Set verdict and reason in the session's master, unless a reason for the end is known already.

    reason: "": what the verdict says by itself.
    """
    master = session.getMasterSession()
    if master.verdict == ACCEPTED:
        master.verdict, master.refusal_reason = verdict, reason


def conclude_by(session, problem: BaseException) -> None:
    """conclude() as the table says, for an exception that is logged elsewhere."""
    conclude(session, _refusal_of(problem).verdict, _reason_of(problem))


def retract(session, verdict: ConnectionVerdict) -> None:
    """Take this verdict back: what it said is no longer so."""
    master = session.getMasterSession()
    if master.verdict is not ACCEPTED and master.verdict == verdict:
        master.verdict, master.refusal_reason = ACCEPTED, ""


def revoke(session, reason: str) -> None:
    """Have the summary of a session say that a newer policy refuses it, and log why; whoever calls this ends it."""
    master = session.getMasterSession()
    master.verdict = ABORTED_BY_POLICY_ACTION
    master.is_revoked = True
    master.summary_info = f"revoked, the policy refuses it now: {reason}"
    log(master.session_id, CORE_POLICY, 2, "Session revoked, the new policy refuses it; reason='%s'", (reason,))


def _refusal_of(problem: BaseException) -> Refusal:
    return next((refusal for refusal in REFUSALS if isinstance(problem, refusal.problem)), _UNKNOWN)


def _reason_of(problem: BaseException) -> str:
    """Return what an exception of ours says; of others their class as well, for they were not meant to say it."""
    if isinstance(problem, ZorpException) or type(problem) is RuntimeError:
        return str(problem)
    return f"{type(problem).__name__}: {problem}"
