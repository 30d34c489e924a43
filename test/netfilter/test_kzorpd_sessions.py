"""kzorpd between networks: forwarded and denied sessions in the log, and instances that hand over."""

import contextlib
import socket

import pytest

from test.support.daemon import Daemon, wait_until
from test.support.kzorpd import Kzorpd
from test.support.net import CLIENT, SERVER, net
from Zorp.netfilter import daemon as kzorpd
from Zorp.netfilter.conntrack import Connection, ConnectionEvents, Endpoints, Event
from Zorp.netfilter.nflog import LoggedPacket
from Zorp.netfilter.plan import RuleIndex
from Zorp.netfilter.session_log import SessionLog
from Zorp.netfilter.site import Site

__all__ = ["net"]

ZONES = 'Zone("office", addrs=("10.1.0.0/24",))\nZone("internet", addrs=("0.0.0.0/0",))'
RULES = '''
Rule(rule_id=1, service="fwd", proto=6, dst_port=700, src_zone="office")
Rule(rule_id=2, service="no", proto=6, dst_port=701, src_zone="office", dst_zone="internet")
Rule(rule_id=3, service="quiet", proto=6, dst_port=702, src_zone="office")
'''


@pytest.fixture
def gateway(net):
    """The network with a kzorpd on its firewall, not started."""
    made = Kzorpd(net.firewall.directory, net.firewall)
    made.net = net
    made.write_policy(ZONES, RULES)
    net.firewall.configure("nft")
    yield made
    made.end()


def exchange(net, port, sent, received):
    """Let a client send and receive this much through the firewall, and close."""
    server = net.server.listen(SERVER, port)
    with net.client.connect(SERVER, port) as client:
        connection, _ = server.accept()
        client.sendall(b"x" * sent)
        client.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
        connection.sendall(b"y" * received)
        connection.close()
        while client.recv(65536):
            pass
    server.close()


def ended(gateway):
    """Wait for the line that ends the forwarded session and return it.

    The kernel looks for dead entries at its leisure, up to a minute apart on a busy host; who
    reads the table has them collected at once.
    """
    def line():
        gateway.net.firewall.run("cat", "/proc/net/nf_conntrack")
        return gateway.log.find("core.session", 3, "kzorp (svc/fwd:1): Ending forwarded session")

    return wait_until(line, "the end of the forwarded session", timeout_s=25)[0]


# ---------------------------------------------------------------- forwarded

def test_a_forwarded_connection_outlives_that_the_name_it_is_permitted_by_moves_but_not_a_change_of_its_rule(gateway):
    # given a connection that is permitted by the address of a host name
    rule = 'Rule(rule_id=1, service="fwd", proto=6, dst_port={0}, dst_zone="friend")'
    zone = 'Zone("friend", hostnames=("friend.test",))'
    gateway.write_policy(zone, rule.format(700))
    dns = gateway.name_server()
    dns.set("friend.test", "A", SERVER, ttl=1)
    gateway.start()
    gateway.wait_for_members("zorp.4.friend", SERVER)
    server = gateway.net.server.listen(SERVER, 700)
    with gateway.net.client.connect(SERVER, 700) as client:
        connection, _ = server.accept()
        # when the name moves, and kzorpd reloads
        dns.set("friend.test", "A", "10.2.0.99", ttl=1)
        gateway.wait_for_members("zorp.4.friend", "10.2.0.99")
        assert gateway.say(b"RELOAD\n") == b"OK"
        # then the connection goes on, as kzorp.yml(5) says, and another one is refused
        client.sendall(b"still here")
        assert connection.recv(100) == b"still here"
        with pytest.raises(TimeoutError):
            gateway.net.client.connect(SERVER, 700, timeout_s=0.3)
        # and with a change of its rule it ends
        gateway.write_policy(zone, rule.format("(700, 701)"))
        assert gateway.say(b"RELOAD\n") == b"OK"
        client.sendall(b"gone")
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(100)


def test_scenario_12_an_ended_forwarded_session_is_logged_with_its_bytes(gateway):
    # given a forwarding rule, and the summary wanted
    gateway.configure("log_session_verdict: true")
    gateway.net.firewall.sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait", "1")
    gateway.start()
    # when a client has exchanged some bytes through it
    exchange(gateway.net, 700, sent=100_000, received=50_000)
    # then its begin and its end are in the log
    begin = gateway.log.wait_for("core.session", 3, "kzorp (svc/fwd): Starting forwarded session")
    assert begin.fields["service"] == "fwd"
    assert (begin.fields["client_zone"], begin.fields["server_zone"]) == ("office", "internet")
    assert begin.fields["client_address"].startswith(f"{CLIENT}:")
    assert begin.fields["server_address"] == f"{SERVER}:700"
    assert begin.fields["protocol"] == "TCP"
    end = ended(gateway)
    assert 100_000 < int(end.fields["orig_bytes"]) < 150_000
    assert 50_000 < int(end.fields["reply_bytes"]) < 80_000
    assert int(end.fields["orig_packets"]) > 3
    # and the summary, with the rule and both sides
    summary = gateway.log.wait_for("core.accounting", 4, "kzorp (svc/fwd:1): Connection summary")
    assert summary.fields["rule_id"] == "1"
    assert summary.fields["verdict"] == "ACCEPTED"
    assert summary.fields["info"] == "Ending forwarded session"
    assert summary.fields["server_address"] == SERVER
    assert int(summary.fields["session_end"]) >= int(summary.fields["session_start"])
    # and kzorp shows the count
    assert "Service name='fwd', flags='transparent,logging', type='PFService', count='1'" in gateway.command(
        "-s", program="kzorp").stdout


def test_scenario_12_without_the_option_there_is_no_summary(gateway):
    gateway.net.firewall.sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait", "1")
    gateway.start()
    exchange(gateway.net, 700, sent=10, received=10)
    ended(gateway)
    assert not gateway.log.find("core.accounting")


def test_events_that_do_not_fit_are_reported_once_and_the_next_ones_come(gateway):
    # given a reader of events with a small socket, who does not read for a while
    gateway.start()
    marks = Site().marks
    events = gateway.namespace.inside(lambda: ConnectionEvents(marks.forward, marks.class_mask))
    with contextlib.closing(events):
        sock = socket.socket(fileno=socket.dup(events.fileno()))
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
        # when more connections begin than it can hold
        for _ in range(40):
            with contextlib.suppress(OSError):
                gateway.net.client.connect(SERVER, 700, timeout_s=1).close()
        # then the reader is told of the gap
        def read_until_lost():
            events.read()
            return events.take_loss()
        wait_until(read_until_lost, "the gap")


# ---------------------------------------------------------------- denied

def test_scenario_6_a_denied_session_is_logged_if_the_service_logs(gateway):
    gateway.start()
    # when clients meet a service that logs and one that does not
    for port in (702, 701):
        with pytest.raises(ConnectionRefusedError):
            gateway.net.client.connect(SERVER, port, source=(CLIENT, 40_000 + port))
    # then there is one line, of the first, with zones, addresses and protocol
    line = gateway.log.wait_for("core.policy", 2, "kzorp (svc/no): Session denied")
    assert line.fields == {
        "service": "no", "client_zone": "office", "server_zone": "internet", "client_address": f"{CLIENT}:40701",
        "server_address": f"{SERVER}:701", "protocol": "TCP"}
    assert len(gateway.log.find("core.policy", 2)) == 1


def test_denials_beyond_the_rate_are_counted_and_told(gateway):
    gateway.configure("deny_log_rate: 2")
    gateway.start()
    for _ in range(20):
        with pytest.raises(ConnectionRefusedError):
            gateway.net.client.connect(SERVER, 701)
    told = gateway.log.wait_for("core.policy", 2, "kzorp (svc/no): ", timeout_s=5)
    assert told

    def counted():
        lines = gateway.log.find("core.policy", 2, "kzorp (svc/no): ")
        denied = sum("Session denied" in line.raw for line in lines)
        held = sum(int(line.raw.split("kzorp (svc/no): ")[1].split()[0]) for line in lines
                   if "messages suppressed." in line.raw)
        return denied + held == 20 and held > 0
    wait_until(counted, "twenty denials, written or counted")


def test_what_no_rule_matches_is_logged_if_the_site_wants_it(gateway):
    # given a site that wants to know, two lines a second
    gateway.configure("log_unmatched: true\ndeny_log_rate: 2")
    gateway.start()
    # when clients try a port that no rule has
    for number in range(5):
        with pytest.raises(TimeoutError):
            gateway.net.client.connect(SERVER, 799, source=(CLIENT, 40_800 + number), timeout_s=0.05)
    # then there are lines with zones, addresses and protocol, and the rest is counted
    line = gateway.log.wait_for("core.policy", 2, "kzorp: No rule matches, packet dropped")
    assert line.fields == {"client_zone": "office", "server_zone": "internet", "client_address": f"{CLIENT}:40800",
                           "server_address": f"{SERVER}:799", "protocol": "TCP"}
    gateway.log.wait_for("core.policy", 2, "kzorp: ", timeout_s=5)
    wait_until(lambda: any("messages suppressed." in line.raw for line in gateway.log.find("core.policy", 2)),
               "the count of what was held back")


# ---------------------------------------------------------------- instances

POLICY = '''
from Zorp.Core import *
from Zorp.Plug import *

Zone("office", addrs=("10.1.0.0/24",))

def intra():
    log(None, "core.info", 3, "kzorp_available='%s', kzorp_version='%s'",
        (Globals.kzorp_available, Globals.kzorp_version[0]))
    Service(name="web", router=TransparentRouter(), proxy_class=PlugProxy)
    Rule(rule_id=1, service="web", proto=6, dst_port=$port_of_rule, src_zone="office")
'''


@pytest.fixture
def instance(gateway):
    """Make an instance on the firewall that finds the kzorpd there: instance(way) -> Daemon, not started."""
    made = []

    def make(way="auto", policy=POLICY, **values):
        (gateway.directory / "zorp").mkdir()
        daemon = Daemon(gateway.directory / "zorp", policy, arguments=(
            "--pid-dir", str(gateway.directory), "--kzorpd-dir", str(gateway.directory), "--packet-rules", way),
            port_of_rule=80, **values)
        daemon.prefix = ("ip", "netns", "exec", gateway.namespace.name)
        daemon.pid_file = lambda *_: gateway.directory / "zorp-intra.pid"
        made.append(daemon)
        return daemon

    (gateway.directory / "instances.conf").write_text("")
    yield make
    for daemon in made:
        daemon.end()


def test_an_instance_serves_by_the_rules_it_handed_over_and_its_policy_knows(gateway, instance):
    # given a kzorpd without instances
    gateway.start()
    # when an instance starts
    daemon = instance().start()
    daemon.log.wait_for("core.info", 4, "Packet rules are in force")
    assert "kzorp_available='True', kzorp_version='4'" in daemon.log.text()
    # then a client is served by its proxy, which sees where the client wanted to go
    server = gateway.net.server.listen(SERVER, 80)
    with gateway.net.client.connect(SERVER, 80) as client:
        connection, peer = server.accept()
        assert peer == "10.2.0.1"
        connection.sendall(b"hello")
        assert client.recv(5) == b"hello"
    server.close()
    # and kzorp says the same of that connection
    said = gateway.command("-e", "tcp", CLIENT, SERVER, "fc", "--dst-port", "80", program="kzorp").stdout
    assert said.splitlines()[1:4] == ["Client zone: office", "Server zone: not found", "Service: web"]


def test_a_refusal_fails_the_start(gateway, instance):
    # given a rule that the packet filter cannot express: an interface name that means many
    gateway.start()
    daemon = instance(policy=POLICY + '    Rule(rule_id=2, service="web", proto=6, dst_port=81, iface="eth+")\n')
    # when the instance starts
    status = daemon.run()
    # then it ends as with a wrong policy and says why, and nothing is in force
    assert status == 2
    assert "Packet rules refused" in daemon.log.text()
    assert gateway.rules() == []


def test_a_refusal_fails_the_reload_and_the_old_policy_serves_on(gateway, instance):
    gateway.start()
    daemon = instance().start()
    daemon.log.wait_for("core.info", 4, "Packet rules are in force")
    rules = gateway.rules()
    daemon.write_policy(POLICY + '    Rule(rule_id=2, service="web", proto=6, dst_port=81, iface="eth+")\n')
    daemon.kill(1)
    daemon.log.wait_for("core.error", 0, "Error reloading policy, reverting to old")
    assert gateway.rules() == rules
    server = gateway.net.server.listen(SERVER, 80)
    with gateway.net.client.connect(SERVER, 80):
        server.accept()
    server.close()


@pytest.mark.parametrize("kzorpd_lives", [True, False])
def test_the_replacement_of_a_crashed_worker_leaves_the_rules_alone(gateway, instance, kzorpd_lives):
    # given an instance whose rules are in force, a broken draft in place of its policy, and perhaps no kzorpd any more
    gateway.start()
    daemon = instance("kzorpd").start()
    daemon.log.wait_for("core.info", 4, "Packet rules are in force")
    rules = gateway.rules()
    daemon.write_policy("broken(\n")
    if not kzorpd_lives:
        gateway.stop()
    # when its worker is killed
    before = daemon.worker_pid()
    daemon.kill(9, worker=True)
    # then another one serves, and the rules are those of before
    wait_until(lambda: daemon.worker_pid() != before, "the next worker; the log:\n" + daemon.log.text())
    assert gateway.rules() == rules
    server = gateway.net.server.listen(SERVER, 80)
    with gateway.net.client.connect(SERVER, 80):
        server.accept()
    server.close()


@pytest.mark.parametrize("on_stop", ["keep", "flush"])
def test_the_rules_of_an_instance_stay_or_go_with_it_as_the_site_wants(gateway, instance, on_stop):
    # given an instance that serves
    gateway.configure(f"on_stop: {on_stop}")
    gateway.start()
    daemon = instance().start()
    daemon.log.wait_for("core.info", 4, "Packet rules are in force")
    rules = gateway.rules()
    # when it is killed, then its rules stay whatever the site wants
    daemon.process.kill()
    daemon.process.wait()
    assert gateway.rules() == rules
    # when it is stopped, they stay or go
    mark = daemon.log.mark()
    daemon.start()
    daemon.log.wait_for("core.info", 4, "Packet rules are in force", after=mark)
    assert daemon.stop() == 0
    assert gateway.rules() == (rules if on_stop == "keep" else [])
    assert not daemon.log.find("core.error")


def test_without_kzorpd_auto_goes_on_and_kzorpd_does_not(gateway, instance):
    daemon = instance("kzorpd")
    assert daemon.run() == 2
    assert "kzorpd does not answer" in daemon.log.text()


def test_an_instance_that_leaves_packet_rules_to_the_administrator_asks_nobody(gateway, instance):
    gateway.start()
    daemon = instance("administrator").start()
    assert "kzorp_available='True'" in daemon.log.text()
    assert gateway.ask("dump")["instances"] == []
    assert gateway.rules() == []


def test_an_instance_without_packet_rules_asks_nobody(gateway, instance):
    gateway.start()
    daemon = instance("none").start()
    assert "kzorp_available='False'" in daemon.log.text()
    assert gateway.ask("dump")["instances"] == []


# ---------------------------------------------------------------- the log of sessions, alone

RULE = RuleIndex(index=7, key="k", instance="i", rule_id=1, service="fwd", kind="forward")


class FakeRules:
    """One rule, no zones."""

    class evaluator:
        @staticmethod
        def zone_of(family, address):
            return None

    @staticmethod
    def rule_of(index):
        return RULE if index == 7 else None

    @staticmethod
    def zone_conditions(rule):
        return False, False


def connection(number, mark=0x40007):
    return Connection(number=number, family=2, protocol=6,
                      original=Endpoints("10.1.0.2", 1000 + number, "10.2.0.2", 80),
                      reply=Endpoints("10.2.0.2", 80, "10.2.0.1", 1000 + number), mark=mark)


def test_after_a_gap_the_list_of_connections_decides(capsys):
    # given two sessions that are known
    listed = [connection(1), connection(2)]
    sessions = SessionLog(Site(), FakeRules, lambda: listed)
    for each in listed:
        sessions.take(Event(False, each))
    # when events were lost, one has ended and one is new
    listed[:] = [connection(2), connection(3)]
    sessions.resynchronise()
    # then the new one has its line and its number, and the gap is told
    errors = capsys.readouterr().err
    assert "ended_without_line='1', started_late='1', alive='2'" in errors
    assert errors.count("Starting forwarded session") == 3
    sessions.take(Event(True, connection(3)))
    assert "(svc/fwd:3): Ending forwarded session" in capsys.readouterr().err
    # and an end that was lost is not told later
    sessions.take(Event(True, connection(1)))
    assert capsys.readouterr().err == ""


def test_marks_and_prefixes_of_others_are_nobody_s_sessions(capsys):
    sessions = SessionLog(Site(), FakeRules, list)
    sessions.take(Event(False, connection(1, mark=0x40008)))
    for prefix in ("", "zorp:", "zorp:8", "zorp:-7", "zorp:7x", "other", "7", "0", "zorp:²"):
        sessions.deny(LoggedPacket(prefix, 2, 6, "10.1.0.2", 1, "10.2.0.2", 2))
    assert capsys.readouterr().err == ""
    assert not sessions.counters


class Batch:
    """What the kernel has sent since the last look."""

    def __init__(self, *messages) -> None:
        self._messages = messages

    def read(self):
        return self._messages

    @staticmethod
    def take_loss():
        return False


def test_a_defect_in_one_event_costs_no_other_its_line(capsys):
    # given a kzorpd of which only the log of sessions is there
    program = kzorpd.Kzorpd.__new__(kzorpd.Kzorpd)
    program._sessions = SessionLog(Site(), FakeRules, list)
    # when an event, and a packet, between others is something that nobody expected
    program._take_events(Batch(Event(False, connection(1)), Event(False, None), Event(False, connection(3))))
    program._take_packets(Batch(*(LoggedPacket("zorp:7", 2, 6, source, 1, "10.2.0.2", 2)
                                 for source in ("10.1.0.1", "nobody", "10.1.0.3"))))
    # then the others have their lines, and that is said
    written = capsys.readouterr().err
    assert written.count("Starting forwarded session") == written.count("Session denied") == 2
    assert written.count("Unexpected error; error=") == 2
