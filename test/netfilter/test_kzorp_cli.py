"""The program kzorp: what it prints, and with what status it ends."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys

import pytest

from test.support.unprivileged import let_everybody_in, run_unprivileged
from Zorp.netfilter import kzorp_cli, kzorp_text
from Zorp.netfilter.kzorp_text import RULE, SERVICE, ZONE, HostState
from Zorp.netfilter.upload import UploadError, read_zones
from Zorp.rules.description import (
    DenyData,
    ForwardData,
    InstanceDescription,
    ListenerData,
    NatData,
    ProxyData,
    ZoneData,
    parse_net,
    to_json,
)
from Zorp.rules.engine import RuleData
from Zorp.wire import kzorpd as wire

POLICY = '''
from Zorp.Core import *
from Zorp.Plug import *
from zones import *

def web():
    Service(name="web", router=TransparentRouter(), proxy_class=PlugProxy)
    PFService(name="fwd", router=DirectedRouter(SockAddrInet("10.2.0.2", 7000), forge_addr=TRUE))
    DenyService(name="no", ipv4_setting=DenyIPv4.DROP, ipv6_setting=DenyIPv6.TCP_RESET)
    Rule(rule_id=1, service="web", proto=6, dst_port=80, src_zone="office", dst_zone="internet")
    Rule(rule_id=2, service="fwd", proto=1, src_zone="office", proto_type=8)
    Rule(rule_id=3, service="no", proto=6, dst_port=80, src_zone="lab")
'''
AWAY = ("kzorp: kzorpd does not answer; this is what the policies say now, with the addresses of host names that "
        "it knew last\n")
ZONES = '''
from Zorp.Zone import Zone

Zone("office", addrs=("10.1.0.0/24",))
Zone("lab", addrs=("10.1.0.64/26",))
Zone("internet", addrs=("0.0.0.0/0",))
'''


@pytest.fixture
def host(tmp_path):
    """A configuration directory with one instance; nothing runs."""
    (tmp_path / "policy.py").write_text(POLICY)
    (tmp_path / "zones.py").write_text(ZONES)
    (tmp_path / "instances.conf").write_text(f"web --policy {tmp_path}/policy.py --state-dir {tmp_path}\n")
    (tmp_path / "kzorp.yml").write_text(f"pid_dir: {tmp_path}\nstate_dir: {tmp_path}\n")
    let_everybody_in(tmp_path)           # the child that loads the policy is nobody in particular
    return tmp_path


@pytest.fixture
def kzorp(host, capsys):
    """Run kzorp in this process: kzorp(arguments...) -> (status, lines of stdout, stderr)."""
    def run(*arguments):
        try:
            status = kzorp_cli.main(["--config-dir", str(host), *arguments])
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err
    return run


# ---------------------------------------------------------------- scenarios 22 to 25

def test_scenario_22_evaluation_names_the_service_of_a_real_connection(kzorp):
    status, lines, _ = kzorp("-e", "tcp", "10.1.0.2", "10.2.0.2", "lo", "--dst-port", "80")
    assert lines == ["evaluating 10.1.0.2:1024 -> 10.2.0.2:80 on lo", "Client zone: office", "Server zone: internet",
                     "Service: web", "Dispatcher: web", "Rule: 1"]
    assert status == 0


def test_scenario_23_evaluation_without_a_port_is_a_usage_error(kzorp):
    status, lines, errors = kzorp("-e", "tcp", "10.1.0.2", "10.2.0.2", "lo")
    assert (status, lines) == (2, [])
    assert "--dst-port" in errors
    assert "Traceback" not in errors


def test_scenario_24_lookup_prints_the_best_zone_or_nothing(kzorp, host):
    assert kzorp("-l", "10.1.0.66") == (0, ["Zone name='lab', admin_parent='None' count='0'"], AWAY)
    assert kzorp("-l", "2001:db8::1") == (0, [], AWAY)


def test_the_narrowest_zone_of_all_instances_is_the_answer(kzorp, host):
    # given an instance that comes first, whose only zone is everything
    (host / "wide.py").write_text("from Zorp.Core import *\n"
                                  "Zone('everything', addrs=('0.0.0.0/0', '10.1.0.128/25', '::/0'))\n"
                                  "def wide():\n    DenyService(name='none')\n"
                                  "    Rule(rule_id=9, service='none', proto=17)\n")
    instances = host / "instances.conf"
    instances.write_text(f"wide --policy {host}/wide.py --state-dir {host}\n{instances.read_text()}")
    (host / "zones.py").write_text(ZONES + "Zone('named', hostnames=('a.test',))\n"
                                   "Zone('office6', addrs=('2001:db8::/32',))\n")
    (host / "host-names.json").write_text('{"a.test": ["10.1.0.129"]}')
    # then the net decides, and between equal nets the order of the instances
    found = {address: kzorp("-l", address)[1] for address in ("10.1.0.66", "10.1.0.130", "10.1.0.129", "192.0.2.1",
                                                              "2001:db8::1")}
    assert {address: lines[0].split("'")[1] for address, lines in found.items()} == {
        "10.1.0.66": "lab", "10.1.0.130": "everything", "10.1.0.129": "named", "192.0.2.1": "everything",
        "2001:db8::1": "office6"}
    # and so do the zones of a connection that no rule takes
    _, lines, _ = kzorp("-q", "-e", "tcp", "10.1.0.66", "10.1.0.129", "lo", "--dst-port", "81")
    assert lines[:3] == ["Client zone: lab", "Server zone: named", "Service: not found"]


def test_scenario_25_an_ordinary_user_is_refused():
    def attempt():
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            return kzorp_cli.main(["-z"]), errors.getvalue()

    assert run_unprivileged(attempt) == (2, "kzorp must be run as root\n")


# ---------------------------------------------------------------- evaluation

def test_evaluation_of_icmp_says_type_and_code(kzorp):
    _, lines, _ = kzorp("-e", "ICMP", "10.1.0.2", "10.2.0.2", "lo", "--icmp-type", "8", "--icmp-code", "0",
                        "--request-id", "7")
    assert lines[0] == ("evaluating 10.1.0.2 -> 10.2.0.2 on lo and the protocol type is 8 "
                        "and the protocol subtype is 0 and the request id is 7")
    assert lines[3:] == ["Service: fwd", "Dispatcher: web", "Rule: 2"]


def test_what_there_is_not_is_not_found(kzorp):
    _, lines, _ = kzorp("-q", "-e", "udp", "10.1.0.66", "10.2.0.2", "lo", "--dst-port", "80")
    assert lines == ["Client zone: lab", "Server zone: internet", "Service: not found", "Dispatcher: not found",
                     "Rule: not found"]


def test_an_interface_that_does_not_exist_fails_the_evaluation_and_the_command(kzorp):
    status, lines, _ = kzorp("-e", "6", "10.1.0.2", "10.2.0.2", "nosuch", "--dst-port", "80")
    assert (status, lines[1:]) == (1, ["Evaluate failed: result='-19', error='No such device'"])


@pytest.mark.parametrize(("arguments", "complaint"), [
    ((), "no action was given"),
    (("-e", "tcp", "10.1.0.2"), "-e option requires 4 arguments: <protocol> <client address> <server address> "
                                "<interface name>"),
    (("-e", "tcp", "10.1.0.x", "10.2.0.2", "lo"), "invalid client ip: 10.1.0.x"),
    (("-e", "tcp", "10.1.0.2", "fe80::g", "lo"), "invalid server ip: fe80::g"),
    (("-e", "tcp", "10.1.0.2", "fe80::1", "lo"), "family of source and destination address is not the same"),
    (("-e", "tcp", "10.1.0.2", "10.2.0.2", "sixteen-letters-"), "invalid interface name (>15 characters)"),
    (("-e", "nosuch", "10.1.0.2", "10.2.0.2", "lo"), "protocol must be protocol name or number"),
    (("-e", "9" * 5000, "10.1.0.2", "10.2.0.2", "lo"), "protocol must be protocol name or number"),
    (("-e", "256", "10.1.0.2", "10.2.0.2", "lo"), "protocol must be protocol name or number"),
    (("-e", "icmp", "10.1.0.2", "10.2.0.2", "lo", "--icmp-type", "8"), "--icmp-type and --icmp-code are needed"),
    (("-e", "tcp", "10.1.0.2", "10.2.0.2", "lo", "--dst-port", "65536"), "a number from 0 to 65535"),
    (("-l", "nonsense"), "invalid ip: nonsense"),
    (("-f", "everything"), "invalid choice"),
])
def test_wrong_command_lines_end_with_2_and_a_reason(kzorp, arguments, complaint):
    status, lines, errors = kzorp(*arguments)
    assert (status, lines) == (2, [])
    assert complaint in errors
    assert "Traceback" not in errors


# ---------------------------------------------------------------- dumps

def test_several_actions_come_in_the_order_of_the_original(kzorp):
    status, lines, _ = kzorp("-b", "-d", "-s", "-z", "-v", "-l", "10.1.0.2")
    assert status == 0
    starts = [line.split(" name=")[0].split(" instance=")[0] for line in lines if not line.startswith((" ", "\t"))]
    assert list(dict.fromkeys(filter(None, starts))) == ["Version: 4.6", "Zone", "Service", "Dispatcher", "Bind"]
    assert lines[-1] == "Zone name='office', admin_parent='None' count='0'"


def test_quiet_prints_no_dump(kzorp):
    assert kzorp("-q", "-z", "-s") == (0, [], AWAY)


def test_json_is_one_document(kzorp):
    _, lines, _ = kzorp("--json", "-v", "-z", "-s", "-d", "-b", "-e", "tcp", "10.1.0.2", "10.2.0.2", "lo",
                        "--dst-port", "80")
    document = json.loads("\n".join(lines))
    assert document["version"] == "4.6"
    assert {zone["name"]: zone["ranges"] for zone in document["zones"]}["lab"] == ["10.1.0.64/255.255.255.192"]
    assert document["evaluate"] == {"client_zone": "office", "server_zone": "internet", "instance": "web",
                                    "service": "web", "rule_id": 1, "disputed": False}
    assert document["dispatchers"][0]["rules"][0]["dst_port"] == [[80, 80]]


def test_a_policy_that_cannot_be_loaded_fails_the_dump(kzorp, host):
    (host / "policy.py").write_text("def web(:\n")
    status, lines, errors = kzorp("-z")
    assert (status, lines) == (1, [])
    assert errors.startswith("Dump failed: result='1' error='")
    assert "policy.py:1" in errors


def test_without_instances_and_without_kzorpd_there_is_no_support(kzorp, host):
    (host / "instances.conf").unlink()
    assert kzorp("-z") == (2, [], "KZorp support not present in kernel: kzorpd does not answer, and "
                                  f"{host}/instances.conf names no instance\n")


def test_flush_alone_ends_with_0_says_what_stays_and_zones_need_kzorpd(kzorp):
    assert kzorp("-f", "services") == (0, [], AWAY + "kzorp: only zones can be emptied; services, rules and binds are "
                                                     "those of the policies, and stay\n")
    assert kzorp("-f", "zones") == (2, [], "KZorp support not present in kernel: kzorpd does not answer\n")


def test_without_kzorpd_host_names_have_the_addresses_known_last_and_disputes_are_said(kzorp, host):
    # given a zone of everything, two by names that share an address, and no kzorpd
    (host / "zones.py").write_text(ZONES.replace('addrs=("10.1.0.0/24",)', 'hostnames=("a.test",)')
                                   .replace('addrs=("10.1.0.64/26",)', 'hostnames=("b.test",)'))
    (host / "host-names.json").write_text('{"a.test": ["203.0.113.5", "203.0.113.6"], "b.test": ["203.0.113.5"]}')
    # when it is asked for them, then all say whose they are
    status, lines, errors = kzorp("-l", "203.0.113.6")
    assert (status, lines) == (0, ["Zone name='office', admin_parent='None' count='0'"])
    assert errors.startswith(AWAY)
    assert kzorp("-l", "203.0.113.5")[1] == [
        "Zone name='internet', admin_parent='None' count='0'",
        "Disputed: host names of several zones have this address; zones='lab,office'"]
    assert "        disputed '203.0.113.5/255.255.255.255'" in kzorp("-z")[1]
    _, lines, _ = kzorp("--json", "-l", "203.0.113.5")
    assert json.loads("\n".join(lines))["disputed"] == ["lab", "office"]


def test_the_texts_of_every_kind_of_service():
    # given services with everything that they can have
    description = InstanceDescription(instance="i", services=(
        ProxyData(name="web"),
        ForwardData(name="fwd", router=("10.2.0.2", 7000), forge_addr=True,
                    snat=(NatData(parse_net("10.1.0.0/24"), parse_net("10.2.0.2/32"), parse_net("192.0.2.1/32")),),
                    dnat=(NatData(parse_net("10.1.0.0/24"), parse_net("0.0.0.0/0"), parse_net("192.0.2.0/30")),)),
        ForwardData(name="through"),
        DenyData(name="no", logging=False, ipv4="ICMP_ADMIN_PROHIBITED", ipv6="ICMP_NO_ROUTE")))
    state = HostState(instances=(description,), counters={(SERVICE, "i", "web"): 5})
    # when they are shown
    lines = list(kzorp_text.service_lines(kzorp_text.service_value("i", service, state)
                                          for service in description.services))
    # then as the original did
    assert lines == [
        "Service name='web', flags='logging', type='Service', count='5'",
        "Service name='fwd', flags='forge_addr,logging', type='PFService', count='0'",
        "        router_dst='10.2.0.2:7000'",
        "        SNAT:  src (10.1.0.0 - 10.1.0.255) dst 10.2.0.2 mapped to 192.0.2.1",
        "        DNAT:  src (10.1.0.0 - 10.1.0.255) mapped to (192.0.2.0 - 192.0.2.3)",
        "Service name='through', flags='transparent,logging', type='PFService', count='0'",
        "Service name='no', flags='', type='DenyService', count='0'",
        "        deny_ipv4='Administratively prohibited'",
        "        deny_ipv6='No route'",
    ]


def test_the_texts_of_zones_rules_and_binds():
    rule = RuleData(rule_id=1, service="web", iface=("eth0",), ifgroup=(3,), proto=(6, 47, 1), src_port=((1, 2),),
                    dst_port=((80, 80),), src_subnet=(parse_net("10.0.0.0/8"), parse_net("2001:db8::/32")),
                    src_zone=("office",))
    zone = ZoneData(name="office", nets=(parse_net("10.1.0.0/24"), parse_net("2001:db8::/32")))
    instance = InstanceDescription(instance="web", zones=(zone,), rules=(rule,),
                                   listeners=(ListenerData(6, "127.0.0.1", 41234),))
    state = HostState(instances=(instance,), counters={(RULE, "web", "1"): 5, (ZONE, "", "office"): 17})
    rules = [{"name": "web", "rules": [kzorp_text.rule_value("web", rule, state)]}]
    assert list(kzorp_text.zone_lines([kzorp_text.zone_value(zone, state)])) == [
        "Zone name='office', admin_parent='None' count='17'",
        "        range '10.1.0.0/255.255.255.0'",
        "        range '2001:db8::/ffff:ffff::'"]
    assert list(kzorp_text.dispatcher_lines(rules)) == [
        "Dispatcher name='web'",
        "        num_rules='1'",
        "",
        "        rule_id='1', service='web', count='5'",
        "           src_iface=['eth0']",
        "           src_ifgroup=[3]",
        "           proto=['TCP', '47', 'ICMP']",
        "           src_port=[(1, 2)]",
        "           dst_port=[(80, 80)]",
        "           src_subnet=[('10.0.0.0', '255.0.0.0'), ('2001:db8::', 'ffff:ffff::')]",
        "           src_zone=['office']",
        ""]
    assert list(kzorp_text.bind_lines(kzorp_text.bind_values(instance))) == [
        "Bind instance='web' protocol='6', address='127.0.0.1', port='41234'"]


# ---------------------------------------------------------------- what kzorpd answers

@pytest.fixture
def answering(host):
    """A kzorpd that gives the same answer to everything and remembers what it was asked."""
    asked = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(host / "kzorpd"))
    listener.listen()

    def start(answer: bytes):
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    peer, _ = listener.accept()
                    with peer, contextlib.suppress(OSError):
                        peer.recv(65536)
                        peer.sendall(answer)
            finally:
                os._exit(1)              # a child that returns would run the other tests again
        asked.append(pid)

    yield start
    listener.close()
    for pid in asked:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_what_kzorpd_has_in_force_is_shown(kzorp, answering):
    description = InstanceDescription(instance="other", zones=(ZoneData(name="live", hostnames=("a.test",)),))
    answering(wire.answer_line(None, {"instances": [to_json(description)], "counters": [[ZONE, "", "live", 3]],
                                      "addresses": {"a.test": ["192.0.2.9"]}}, as_json=True))
    assert kzorp("-z") == (0, ["Zone name='live', admin_parent='None' count='3'",
                               "        range '192.0.2.9/255.255.255.255'"], "")
    assert kzorp("-l", "192.0.2.9")[1] == ["Zone name='live', admin_parent='None' count='3'"]


@pytest.mark.parametrize("answer", [
    b"nonsense\n", b"{}\n", b"[1]\n", b'{"ok": true}\n', b'{"ok": false, "error": "not now"}\n', b"",
    b'{"ok": true, "instances": ["x"], "counters": [], "addresses": {}}\n',
    b'{"ok": true, "instances": [], "counters": [1], "addresses": {}}\n'])
def test_an_answer_that_makes_no_sense_is_a_failed_dump_and_no_traceback(kzorp, answering, answer):
    answering(answer)
    status, lines, errors = kzorp("-z")
    assert (status, lines) == (1, [])
    assert errors.startswith("Dump failed: result='1' error='")


# ---------------------------------------------------------------- upload

def test_an_uploaded_file_becomes_zones():
    zones = read_zones(["# comment\n", "\n", "'office';'';10.1.0.0/24, 10.9.9.9\n", '"lab";office;\n'])
    assert zones == (ZoneData(name="office", nets=(parse_net("10.1.0.0/24"), parse_net("10.9.9.9"))),
                     ZoneData(name="lab", parent="office"))


@pytest.mark.parametrize("line", [
    "office;10.1.0.0/24", "office;;10.1.0.0/33", "office;nosuch;", ";;", "office;;10.1.0.1/24", "a;b;c;d", "office;;x"])
def test_a_wrong_line_is_shown_with_the_text_of_the_original(kzorp, host, line):
    (host / "zones.txt").write_text(f"good;;10.7.0.0/16\n{line}\n")
    status, lines, errors = kzorp("-u", str(host / "zones.txt"))
    assert (status, lines) == (1, [])
    assert errors.startswith(f"Error while processing the following line: {line}\n")


def test_the_same_net_in_two_zones_is_refused():
    with pytest.raises(UploadError, match="duplicate subnet detected"):
        read_zones(["a;;10.1.0.0/24", "b;;10.1.0.0/24"])
    with pytest.raises(UploadError, match="duplicate subnet detected"):
        read_zones(["a;;0.0.0.0/0", "b;;0.0.0.0/0"])


def test_a_zone_whose_name_no_terminal_can_show_is_shown(host):
    # given an uploaded file of another encoding, and a terminal that takes UTF-8 only
    (host / "zones.txt").write_bytes(b"z\xe9ne;;10.0.0.0/8\n")
    program = ("import sys\nfrom unittest import mock\nfrom Zorp.netfilter import kzorp_cli\n"
               "with mock.patch.object(kzorp_cli, 'ask'):\n    sys.exit(kzorp_cli.main())")
    shown = subprocess.run([sys.executable, "-c", program, "--config-dir", str(host), "-u", str(host / "zones.txt")],
                           env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, text=True,
                           check=False)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "z\\udce9ne\n", "")
