"""A reload with revocation reaches who is not in the list of sessions yet, and secondary sessions one by one."""

import os
import signal
import socket
import textwrap
import threading

import pytest

from test.support.daemon import wait_until
from test.support.gateway import Server, ended, exchange
from Zorp.runtime.consent import Consent

POLICY = """
    import os, time
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("office", "127.0.0.2/32")
    Zone("lab", "127.0.0.3/32")
    Zone("rest", ["127.0.0.0/8"])

    def stay():
        open("$dir/here", "w").close()
        while not os.path.exists("$dir/go"):
            time.sleep(0.01)

    class SomeDispatcher(ZoneDispatcher):
        def getService(self, session):
            CHOOSE
            return ZoneDispatcher.getService(self, session)

    class SomePlug(PlugProxy):
        def config(self):
            CONFIG

    def intra():
        Service("plug", SomePlug, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)), LIMITS)
        SomeDispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), {TABLE})
"""
BOTH = '"office": "plug", "lab": "plug"'
LAB = '"lab": "plug"'
TO_LAB_ONLY = 'limit_target_zones_to="lab"'


def policy(table=BOTH, limits="", choose="pass", config="pass"):
    text = textwrap.dedent(POLICY)
    for word, value in (("TABLE", table), (", LIMITS", f", {limits}"), ("CHOOSE", choose), ("CONFIG", config)):
        text = text.replace(word, value)
    return text


@pytest.fixture
def server():
    with Server() as made:
        yield made


def revoke(daemon, text) -> str:
    daemon.write_policy(text)
    with daemon.control() as control:
        return control.ask("RELOAD REVOKE")


def come_and_stay(daemon, address) -> socket.socket:
    """Return a client whose session has reached stay()."""
    (daemon.directory / "here").unlink(missing_ok=True)
    client = daemon.connect(source=(address, 0))
    wait_until((daemon.directory / "here").exists, "the session")
    return client


def let_go(daemon) -> None:
    (daemon.directory / "go").touch()


def test_a_session_whose_service_is_still_being_chosen_is_judged_when_it_is(zorp, server):
    # given two connections for which the old policy is choosing a service
    daemon = zorp(policy(choose="stay()"), server_port=server.port)
    office, lab = come_and_stay(daemon, "127.0.0.2"), come_and_stay(daemon, "127.0.0.3")
    # when the new one refuses the office, and the old one has chosen afterwards
    assert revoke(daemon, policy(LAB)) == "OK Reload successful; revoked='0'"
    let_go(daemon)
    # then the office is refused, with line and summary, and the lab is served
    assert ended(office)
    line = daemon.log.wait_for("core.policy", 2, "Session revoked, the new policy refuses it")
    assert line.fields["reason"] == "the dispatcher has no service for it"
    summary = daemon.log.wait_for("core.summary", 4, "Connection summary", session=line.session)
    assert (summary.fields["verdict"], summary.fields["server_address"]) == ("ABORTED_BY_POLICY_ACTION", "(NULL)")
    assert exchange(lab) == b"ping"


def test_a_session_without_a_server_is_judged_when_it_wants_one(zorp, server):
    # given a session that has not come to its server when the policy changes
    daemon = zorp(policy(config="stay()"), server_port=server.port)
    office = come_and_stay(daemon, "127.0.0.2")
    # when that server is forbidden
    assert revoke(daemon, policy(limits=TO_LAB_ONLY)) == "OK Reload successful; revoked='0'"
    let_go(daemon)
    # then it does not get there
    assert ended(office)
    line = daemon.log.wait_for("core.policy", 1, "Server connection not permitted by the new policy")
    assert line.fields["reason"] == "service plug may not go to servers in zone rest"
    assert not daemon.log.find("core.session", 3, "Server connection established")


def test_a_session_without_a_server_goes_where_the_newest_policy_lets_it(zorp, server):
    # given a session without a server, a revocation, and one more policy after it
    daemon = zorp(policy(config="stay()"), server_port=server.port)
    office = come_and_stay(daemon, "127.0.0.2")
    assert revoke(daemon, policy(limits=TO_LAB_ONLY)) == "OK Reload successful; revoked='0'"
    daemon.reload(policy())
    let_go(daemon)
    assert exchange(office) == b"ping"


def test_a_new_policy_that_hangs_refuses_the_server_in_time(zorp, server):
    # given a new policy that cannot judge, and a session that wants a server
    daemon = zorp(policy(config="stay()"), server_port=server.port, arguments=("--reload-patience", "1"))
    office = come_and_stay(daemon, "127.0.0.2")
    assert revoke(daemon, policy(choose="time.sleep(60)")).startswith("FAIL Reload successful, not all sessions")
    let_go(daemon)
    assert ended(office)
    line = daemon.log.wait_for("core.policy", 1, "Server connection not permitted by the new policy")
    assert line.fields["reason"] == "it cannot be judged in time"


def test_only_the_refused_of_several_secondary_sessions_end(zorp, server):
    # given four sessions that share a proxy and a session id
    daemon = zorp(policy(config="self.secondary_mask, self.secondary_sessions = 0, 5"), server_port=server.port)
    clients = []
    for address in ("127.0.0.3", "127.0.0.2", "127.0.0.2", "127.0.0.3"):
        clients.append(daemon.connect(source=(address, 0)))
        assert exchange(clients[-1]) == b"ping"
    # when two of them are refused
    assert revoke(daemon, policy(LAB)) == "OK Reload successful; revoked='2'"
    # then these two end, and the others go on
    assert ended(clients[1])
    assert ended(clients[2])
    assert exchange(clients[0]) == exchange(clients[3]) == b"ping"


def test_a_session_that_is_ending_already_is_not_counted_again(zorp, server):
    # given a session that was revoked, and whose policy does not return from its shutdown()
    begin = "class SomePlug(PlugProxy):"
    slow = policy().replace(begin, f"{begin}\n    def shutdown(self): stay()\n")
    daemon = zorp(slow, server_port=server.port)
    office = daemon.connect(source=("127.0.0.2", 0))
    assert exchange(office) == b"ping"
    assert revoke(daemon, policy(LAB)) == "OK Reload successful; revoked='1'"
    wait_until((daemon.directory / "here").exists, "the shutdown")
    # when the next reload revokes, then it has nobody to end
    assert revoke(daemon, policy(LAB)) == "OK Reload successful; revoked='0'"
    let_go(daemon)


def test_the_last_session_of_an_older_policy_is_counted_although_its_worker_ends_with_it(zorp, server):
    # given a session that is over, and its worker idle, before whoever asks it to end goes on
    begin = "class SomePlug(PlugProxy):"
    asked = f"{begin}\n    def request_stop(self): PlugProxy.request_stop(self); time.sleep(0.5)\n"
    daemon = zorp(policy().replace(begin, asked), server_port=server.port)
    office = daemon.connect(source=("127.0.0.2", 0))
    assert exchange(office) == b"ping"
    # when it is revoked, then the answer has counted it
    assert revoke(daemon, policy(LAB)) == "OK Reload successful; revoked='1'"
    assert ended(office)


def test_a_worker_that_answers_too_late_for_the_order_has_its_sessions_judged_all_the_same(zorp, server):
    # given two sessions whose worker stands still while a reload revokes
    daemon = zorp(policy(), server_port=server.port, arguments=("--reload-patience", "1"))
    office, lab = (daemon.connect(source=(address, 0)) for address in ("127.0.0.2", "127.0.0.3"))
    assert exchange(office) == exchange(lab) == b"ping"
    old = daemon.worker_pid()
    os.kill(old, signal.SIGSTOP)
    try:
        assert revoke(daemon, policy(LAB)).startswith("FAIL Reload successful, not all sessions could be judged")
    finally:
        os.kill(old, signal.SIGCONT)             # when it goes on
    # then the one that the policy in force refuses ends, and the other goes on
    assert ended(office)
    assert exchange(lab) == b"ping"
    line = daemon.log.wait_for("core.info", 3, "Sessions of an older policy were judged late")
    assert line.fields == {"pid": str(old), "revoked": "1"}


# ---------------------------------------------------------------- the question by itself

class _Master:
    client_address = client_local = client_listen = None
    session_id, secondary_connection_id = "svc/intra/plug:1", 0


@pytest.mark.parametrize(("refused", "reason"), [
    ([], ""), ([[["svc/intra/plug:1", 0], "no rule matches"]], "no rule matches"), (None, "no worker serves")])
def test_consent_is_what_the_serving_worker_answers(refused, reason):
    def send(kind, number, session):
        assert (kind, session) == ("judge", [["svc/intra/plug:1", 0], "", None])
        threading.Thread(target=consent.answered, args=(number, refused)).start()

    consent = Consent(send, patience_s=10)
    assert consent(_Master, None) == reason


def test_no_consent_without_an_answer():
    consent = Consent(lambda *words, **fields: None, patience_s=0.01)
    assert consent(_Master, None) == "it cannot be judged in time"
    consent.answered(1, [])          # too late, and no error
