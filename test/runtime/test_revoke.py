"""Reload with revocation: sessions that the new policy refuses end, all others go on."""

import contextlib
import socket
import textwrap

import pytest

from test.support.daemon import wait_until
from test.support.gateway import Server, ended, exchange
from test.support.net import SERVER, net
from test.support.net import policy as net_policy
from test.support.ports import free_port
from Zorp.runtime import reloading
from Zorp.runtime.judgement import judge

__all__ = ["net"]

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("office", "127.0.0.2/32")
    Zone("lab", "127.0.0.3/32")
    Zone("rest", ["127.0.0.0/8"])

    class SomePlug(PlugProxy):
        pass

    def intra():
        to_server = DirectedRouter(SockAddrInet("127.0.0.1", $server_port))
        Service("plug", SomePlug, router=to_server, LIMITS)
        Service("other", SomePlug, router=to_server)
        Service("datagrams", SomePlug, router=DirectedRouter(SockAddrInet("127.0.0.1", $udp_server_port)))
        ZoneDispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), {TABLE})
        RECEIVER
"""
BOTH = '"office": "plug", "lab": "plug"'
RECEIVER = 'Receiver(SockAddrInet("127.0.0.1", $udp_port), service="datagrams")'


def policy(table=BOTH, limits="", receiver=RECEIVER):
    text = textwrap.dedent(POLICY)
    for word, value in (("TABLE", table), (", LIMITS", f", {limits}"), ("RECEIVER", receiver)):
        text = text.replace(word, value)
    return text


@contextlib.contextmanager
def two_sessions(zorp, *arguments):
    """A daemon with a session of the office and one of the lab."""
    with Server() as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_server:
        udp_server.bind(("127.0.0.1", 0))
        udp_server.settimeout(10)
        made = zorp(policy(), server_port=server.port, udp_port=free_port(socket.SOCK_DGRAM),
                    udp_server_port=udp_server.getsockname()[1], arguments=arguments)
        made.udp_server = udp_server
        made.office = made.connect(source=("127.0.0.2", 0))
        made.lab = made.connect(source=("127.0.0.3", 0))
        assert exchange(made.office) == exchange(made.lab) == b"ping"
        yield made


@pytest.fixture
def daemon(zorp):
    """A daemon with a session of the office and one of the lab."""
    with two_sessions(zorp) as made:
        yield made


@pytest.fixture
def impatient(zorp):
    """The same daemon; it waits a second only for what hangs, or is as slow as that."""
    with two_sessions(zorp, "--reload-patience", "1") as made:
        yield made


def revoke(daemon, text) -> str:
    daemon.write_policy(text)
    with daemon.control() as control:
        return control.ask("RELOAD REVOKE")


def test_without_the_word_every_session_goes_on(daemon):
    daemon.reload(policy('"lab": "plug"'))
    assert exchange(daemon.office) == b"ping"


REFUSALS = {
    "no entry": (policy('"lab": "plug"'), "the dispatcher has no service for it"),
    "another service": (policy('"office": "other", "lab": "plug"'), "it would get the service other"),
    "access list": (policy().replace('Zone("lab", "127.0.0.3/32")', 'Zone("lab", "127.0.0.3/32", '
                                     'inbound_services=["*"], outbound_services=["*"])')
                    .replace('Zone("rest", ["127.0.0.0/8"])', 'Zone("rest", ["127.0.0.0/8"], inbound_services=["*"])'),
                    "service plug may not leave zone office"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_refused_session_ends_with_the_reason_and_the_other_goes_on(daemon, text, reason):
    # when the policy gets an entry less, and running sessions are judged by it
    assert revoke(daemon, text) == "OK Reload successful; revoked='1'"
    # then the session of the office ends, with line and summary, and that of the lab goes on
    assert ended(daemon.office)
    line = daemon.log.wait_for("core.policy", 2, "Session revoked, the new policy refuses it")
    assert line.fields["reason"] == reason
    summary = daemon.log.wait_for("core.summary", 4, "Connection summary", session=line.session)
    assert summary.fields["verdict"] == "ABORTED_BY_POLICY_ACTION"
    assert reason in summary.fields["info"]
    assert not daemon.log.find(text="User initiated proxy termination request received")       # it was the policy
    assert exchange(daemon.lab) == b"ping"


def test_a_server_that_is_forbidden_now_ends_all_who_are_connected_to_it(daemon):
    assert revoke(daemon, policy(limits='limit_target_zones_to="lab"')) == "OK Reload successful; revoked='2'"
    assert ended(daemon.office)
    assert ended(daemon.lab)
    line = daemon.log.wait_for("core.policy", 2, "Session revoked, the new policy refuses it")
    assert line.fields["reason"] == "service plug may not go to servers in zone rest"


def test_sessions_of_datagrams_are_judged_too(daemon):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.2", 0))
        client.sendto(b"one", ("127.0.0.1", daemon.values["udp_port"]))
        assert daemon.udp_server.recv(100) == b"one"
        assert revoke(daemon, policy(receiver="pass")) == "OK Reload successful; revoked='1'"
    line = daemon.log.wait_for("core.policy", 2, "Session revoked, the new policy refuses it")
    assert (line.session, line.fields["reason"]) == ("svc/intra/datagrams:0", "nothing listens there any more")
    assert exchange(daemon.office) == exchange(daemon.lab) == b"ping"


def test_sessions_of_several_older_policies_are_judged(daemon):
    # given a session of the first policy and one of the second
    daemon.reload(policy())
    second = daemon.connect(source=("127.0.0.2", 0))
    assert exchange(second) == b"ping"
    # when the third refuses both
    assert revoke(daemon, policy('"lab": "plug"')) == "OK Reload successful; revoked='2'"
    assert ended(daemon.office)
    assert ended(second)
    assert exchange(daemon.lab) == b"ping"


def test_a_policy_that_does_not_load_revokes_nothing(daemon):
    assert revoke(daemon, "broken(\n").startswith("FAIL Reload failed; reason='")
    assert exchange(daemon.office) == exchange(daemon.lab) == b"ping"


def test_policy_code_that_hangs_while_it_judges_is_left_alone_and_said(impatient):
    # given a new policy whose choice of service does not return
    text = policy().replace('ZoneDispatcher(', 'class Slow(ZoneDispatcher):\n'
                            '        def getService(self, session):\n'
                            '            import time; time.sleep(60)\n'
                            '    Slow(')
    answer = revoke(impatient, text)
    assert answer.startswith("FAIL Reload successful, not all sessions could be judged; revoked='0', "
                             "reason='step ")
    assert exchange(impatient.office) == b"ping"
    impatient.log.wait_for("core.error", 1, "Sessions of an older policy could not be judged, they go on")


# ---------------------------------------------------------------- loads that hang

HERE = 'open("$dir/here", "w").close()\n'
HANGING = {"busy": HERE + "while 1: pass\n", "asleep": HERE + "import time\ntime.sleep(600)\n"}


@pytest.mark.parametrize("text", HANGING.values(), ids=HANGING)
def test_a_load_that_hangs_does_not_hold_the_next_one(impatient, text):
    # given a policy that never finishes loading, and somebody who waits for it
    impatient.write_policy(text)
    with impatient.control() as first, impatient.control() as second:
        first.send(b"RELOAD WAIT\n")
        wait_until((impatient.directory / "here").exists, "the load")
        assert int(second.ask("GETVALUE info.policy.load_started")) > 0
        # when the file is corrected and a reload asked for
        impatient.write_policy(policy())
        assert second.ask("RELOAD WAIT") == "OK Reload successful"
        # then the one that hung was given up, and whoever waited hears of the policy in force
        assert first.line() == "OK Reload successful"
        assert second.ask("GETVALUE info.policy.load_started") == "0"
    line = impatient.log.wait_for("core.error", 0, "Loading the policy failed")
    assert "because a newer reload waited" in line.fields["error"]
    assert line.fields["generation"] == "2"


def test_what_cannot_be_judged_is_refused():
    assert judge([["svc/intra/plug:1", "plug", None], ["svc/intra/plug:2", "plug", ["too short"]]]) == [
        ["svc/intra/plug:1", "it cannot be judged without its addresses"],
        ["svc/intra/plug:2", "it cannot be judged: TypeError"]]


def test_outcomes_are_told_when_nothing_is_wanted_any_more():
    # given a reload under way, and another that is to revoke
    told, reloads = [], reloading.Reloads()
    reloads.want(revoke=False)
    reloads.begun()
    assert reloads.is_revoking is False
    reloads.want(revoke=True)
    reloads.when_ended(told.append)
    # when the first fails and the second ends
    reloads.ended(reloading.Outcome(False, "broken"))
    assert told == []
    reloads.begun()
    assert reloads.is_revoking is True
    reloads.ended(reloading.Outcome(True, revoked=3))
    assert told == [reloading.Outcome(True, "", 3)]
    assert reloads.failures == 1


@pytest.mark.parametrize("outcome", [reloading.Outcome(False, "broken"), reloading.Outcome(True, "not all judged")])
def test_a_revocation_that_was_not_done_is_the_duty_of_the_reload_that_follows(outcome):
    # given somebody who waits for a reload that revokes, and a plain reload wanted meanwhile
    told, reloads = [], reloading.Reloads()
    reloads.want(revoke=True)
    reloads.begun()
    reloads.when_ended(told.append)
    reloads.want(revoke=False)
    # when the first fails, or cannot judge everybody
    reloads.ended(outcome)
    # then the second revokes
    assert told == []
    reloads.begun()
    assert reloads.is_revoking is True
    # and a third one does not
    reloads.ended(reloading.Outcome(True, revoked=1))
    reloads.want(revoke=False)
    reloads.begun()
    assert reloads.is_revoking is False


def test_a_revocation_that_succeeded_does_not_repeat():
    reloads = reloading.Reloads()
    reloads.want(revoke=True)
    reloads.begun()
    reloads.want(revoke=False)
    reloads.ended(reloading.Outcome(True))
    reloads.begun()
    assert reloads.is_revoking is False


def test_nobody_hears_of_success_once_the_instance_stops():
    # given a successful reload, another under way, a third wanted, and somebody who waits for it
    told, reloads = [], reloading.Reloads()
    reloads.want(revoke=False)
    reloads.begun()
    reloads.ended(reloading.Outcome(True))
    reloads.want(revoke=False)
    reloads.begun()
    reloads.want(revoke=True)
    reloads.when_ended(told.append)
    # when the instance stops, and somebody asks for one more
    reloads.give_up("it stops")
    reloads.want(revoke=True)
    reloads.when_ended(told.append)
    assert told == [reloading.Outcome(False, "it stops")] * 2


def test_reload_revoke_answers_for_a_policy_that_judged_although_its_own_failed(daemon):
    # given a reload that revokes, of a policy that will turn out to be broken
    daemon.write_policy(HERE + 'import os, time\nwhile not os.path.exists("$dir/go"): time.sleep(0.01)\n1/0\n')
    with daemon.control() as first, daemon.control() as second:
        first.send(b"RELOAD REVOKE\n")
        wait_until((daemon.directory / "here").exists, "the load")
        # when the file is corrected and a plain reload asked for meanwhile
        daemon.write_policy(policy('"lab": "plug"'))
        assert second.ask("RELOAD") == "OK Reload initiated"
        (daemon.directory / "go").touch()
        # then what is said is true
        assert first.line() == "OK Reload successful; revoked='1'"
    assert ended(daemon.office)
    assert exchange(daemon.lab) == b"ping"


# ---------------------------------------------------------------- rules, with packet rules of the kernel

RULES = net_policy("""
    Service("web", PlugProxy)
    Service("other", PlugProxy)
    Rule(src_zone="clients", dst_port=80, service="$first")
    Rule(src_zone="clients", dst_port=81, iface="$iface", service="web")
    """, zones='Zone("clients", "10.1.0.0/24")\nZone("servers", "10.2.0.0/24")\n')


@pytest.mark.netns
def test_sessions_of_rules_are_judged_with_port_and_interface(net):
    # given two sessions that came by rules, one of them by a rule for an interface
    daemon = net.firewall.start_zorp(RULES, first="web", iface="fc")
    clients = {}
    for port in (80, 81):
        listening = net.server.listen(SERVER, port)
        clients[port] = net.client.connect(SERVER, port)
        clients[port, "far"] = listening.accept()[0]
    # when the policy stays as it is, nothing ends
    with daemon.control() as control:
        assert control.ask("RELOAD REVOKE") == "OK Reload successful; revoked='0'"
        # and when port 80 gets another service, its session does; then the interface is another one
        daemon.write_policy(RULES, first="other")
        assert control.ask("RELOAD REVOKE") == "OK Reload successful; revoked='1'"
        assert ended(clients[80])
        daemon.write_policy(RULES, first="other", iface="fs")
        assert control.ask("RELOAD REVOKE") == "OK Reload successful; revoked='1'"
        assert ended(clients[81])
    reasons = [line.fields["reason"] for line in daemon.log.find("core.policy", 2, "Session revoked")]
    assert reasons == ["it would get the service other", "no rule matches"]
