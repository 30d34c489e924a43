"""Exceptions of a connection become a verdict and one line of log."""

import pytest

from Zorp import Exceptions
from Zorp.acceptance.verdict import ACCEPTED, ConnectionVerdict, refuse

from test.support.logged import captured_log


class Session:
    """A master session as refuse() sees it."""

    session_id = "svc/x:0"
    verdict = ACCEPTED
    refusal_reason = ""

    def getMasterSession(self):
        return self


def test_names_and_comparison():
    names = ["ACCEPTED", "DENIED_BY_POLICY", "DENIED_BY_LIMIT", "DENIED_BY_CONNECTION_FAIL", "DENIED_BY_UNKNOWN_FAIL",
             "ABORTED_BY_POLICY_ACTION", "INVALID_POLICY_CALL"]
    assert [str(ConnectionVerdict(n)) for n in range(7)] == names
    assert ConnectionVerdict(ConnectionVerdict.DENIED_BY_LIMIT) == ConnectionVerdict(2)
    assert ConnectionVerdict(1) != ConnectionVerdict(2)
    assert ConnectionVerdict(ConnectionVerdict(3)) == 3


@pytest.mark.parametrize("value", [-1, 7, "ACCEPTED", None])
def test_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="verdict"):
        ConnectionVerdict(value)


@pytest.mark.parametrize(("problem", "verdict", "text"), [
    (Exceptions.ZoneException("AF_INET(1.2.3.4:5)"), "DENIED_BY_POLICY",
     "Zone not found; info='Zone not found: AF_INET(1.2.3.4:5)'"),
    (Exceptions.DACException("no"), "DENIED_BY_POLICY", "DAC policy violation; info='DAC policy violation: no'"),
    (Exceptions.MACException("no"), "DENIED_BY_POLICY", "MAC policy violation; info='MAC policy violation: no'"),
    (Exceptions.AuthException("no"), "DENIED_BY_POLICY",
     "Authentication failure; info='Authentication or authorization failed: no'"),
    (Exceptions.LimitException("Instance limit reached"), "DENIED_BY_LIMIT",
     "Connection over permitted limits; info='Limit error: Instance limit reached'"),
    (Exceptions.LicenseException("no"), "DENIED_BY_LIMIT",
     "Attempt to use an unlicensed component, or number of licensed hosts exceeded;"
     " info='Attempt to use unlicensed components: no'"),
    (RuntimeError("x"), "DENIED_BY_UNKNOWN_FAIL", "Unexpected runtime error occured; info='x'"),
])
def test_table(problem, verdict, text):
    session = Session()
    with captured_log() as logged:
        refuse(session, problem)
    assert str(session.verdict) == verdict
    assert session.refusal_reason == str(problem)
    assert [(m.session, m.tag, m.level, m.text) for m in logged.messages] == [("svc/x:0", "core.policy", 1, text)]


@pytest.mark.parametrize("problem", [ValueError("x"), Exceptions.ServiceException("x"), SystemExit(1), KeyError("x")])
def test_anything_else_leaves_a_traceback(problem, monkeypatch):
    session, traced = Session(), []
    monkeypatch.setattr("Zorp.acceptance.verdict.log_exception", traced.append)
    refuse(session, problem)
    assert str(session.verdict) == "DENIED_BY_UNKNOWN_FAIL"
    assert traced == ["svc/x:0"]


def test_children_of_runtime_error_leave_a_traceback_too(monkeypatch):
    session, traced = Session(), []
    monkeypatch.setattr("Zorp.acceptance.verdict.log_exception", traced.append)
    with captured_log() as logged:
        refuse(session, NotImplementedError("x"))
    assert logged.find("Unexpected runtime error occured; info='x'")
    assert traced == ["svc/x:0"]
