"""Whatever policy code does wrong, wherever it is called: the summary says so.

Each callback of a session is combined with each fault.  A session that policy code broke is never
"ACCEPTED", both peers see its end, the shutdown events run, and the reason is kept for the summary.
"""

from __future__ import annotations

import pytest

from test.support.proxies import serve
from Zorp.Exceptions import DACException, LimitException, PolicyError, ZoneException
from Zorp.Plug import PlugProxy

__all__ = ["serve"]          # fixture


def _raises(problem):
    def fault(self, *args):
        raise problem
    fault.__name__ = f"raises {type(problem).__name__}"
    return fault


def _returns(value):
    def fault(self, *args):
        return value
    fault.__name__ = f"returns {type(value).__name__}"
    return fault


ABORTED, INVALID, UNKNOWN = "ABORTED_BY_POLICY_ACTION", "INVALID_POLICY_CALL", "DENIED_BY_UNKNOWN_FAIL"
POLICY, LIMIT, UNREACHED = "DENIED_BY_POLICY", "DENIED_BY_LIMIT", "DENIED_BY_CONNECTION_FAIL"

EVENTS = ("__pre_config__", "config", "__post_config__", "__pre_startup__", "startup", "__post_startup__",
          "__pre_shutdown__", "shutdown", "__post_shutdown__", "startUp", "shutDown")
EXCEPTIONS = (KeyError("k"), DACException("d"), PolicyError("p", remedy="r"), NotImplementedError(), SystemExit(1),
              RecursionError(), OSError(5, "o"), StopIteration(), BaseException("b"))
GARBAGE = ("text", b"bytes", object(), [], {}, 1.5)

BY_TABLE = {DACException: POLICY, LimitException: LIMIT, ZoneException: POLICY}
FAULTS = (
    [(name, _raises(problem), ABORTED) for name in EVENTS for problem in EXCEPTIONS]
    + [("connectServer", _raises(problem), BY_TABLE.get(type(problem), UNKNOWN))
       for problem in (*EXCEPTIONS, LimitException("l"), ZoneException("z"))]
    + [("connectServer", _returns(None), UNREACHED)]
    + [("connectServer", _returns(value), INVALID) for value in GARBAGE]
    + [("requestStack", _raises(problem), ABORTED) for problem in EXCEPTIONS]
    + [("requestStack", _returns(value), UNKNOWN) for value in (5, object(), [], (1,), (99, "x"))]
    + [("packetStats", _raises(problem), ABORTED) for problem in EXCEPTIONS]
    + [("packetStats", _returns(value), ABORTED) for value in (None, 0, 3, 99, *GARBAGE)]
)


@pytest.mark.parametrize(("name", "fault", "verdict"), FAULTS,
                         ids=[f"{name}-{fault.__name__}-{n}" for n, (name, fault, _) in enumerate(FAULTS)])
def test_broken_policy_code_is_no_accepted_session(serve, name, fault, verdict):
    ended = []

    class Broken(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            self.packet_stats_interval_packet = 1 if name == "packetStats" else 0

        def __destroy__(self):
            ended.append(1)
            PlugProxy.__destroy__(self)

    setattr(Broken, name, fault)
    # given a class whose policy code has a fault; when a client has a session
    with serve(Broken) as session:
        session.client.sendall(b"x")
        if "hut" in name:
            session.server.recv(1)
            session.client.close()
        # then the summary tells, with a reason, and everything came to its end
        assert session.verdict == verdict
        summary, = session.log.find("Connection summary;")
        assert f"verdict='{verdict}'" in summary.text
    assert ended == [1]
    assert session.master.refusal_reason or verdict in (UNREACHED, ABORTED)


@pytest.mark.parametrize("notice", ["closedByAbort", "invalidPolicyCall"])
@pytest.mark.parametrize("problem", EXCEPTIONS, ids=lambda problem: type(problem).__name__)
def test_a_notice_that_fails_itself_hides_nothing(serve, notice, problem):
    class Broken(PlugProxy):
        def config(self):
            self._closed_by_abort() if notice == "closedByAbort" else self._invalid_policy_call()
            raise KeyError

    setattr(Broken, notice, _raises(problem))
    with serve(Broken) as session:
        assert session.verdict == (ABORTED if notice == "closedByAbort" else INVALID)


@pytest.mark.parametrize("problem", EXCEPTIONS, ids=lambda problem: type(problem).__name__)
def test_target_that_cannot_be_set_is_an_abort(serve, problem):
    class Asking(PlugProxy):
        setServerAddress = _raises(problem)

        def _engine_main(self):
            self._connect_server("host.invalid", 80)

    with serve(Asking) as session:
        assert session.verdict == ABORTED
        assert not session.server_was_contacted
    assert session.master.refusal_reason == f"policy code raised {type(problem).__name__}"


@pytest.mark.parametrize("harm", [
    lambda proxy: setattr(proxy, "session", None),
    lambda proxy: vars(proxy).clear(),
    lambda proxy: setattr(proxy, "__class__", type("Other", (), {})),
], ids=["no session", "no attributes", "another class"])
def test_a_proxy_that_its_policy_has_taken_apart_is_no_accepted_session(serve, harm):
    class Broken(PlugProxy):
        def config(self):
            harm(self)

    with serve(Broken) as session:
        session.wait_for_end()
        assert session.verdict == UNKNOWN
