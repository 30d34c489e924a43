"""kzorpd: host names, reloads, requests, signals, and that nothing wrong changes anything."""

import dataclasses
import json
import os
import select
import selectors
import signal
import socket
import time

import pytest

from test.support.daemon import DEADLINE_S, wait_until
from test.support.dns_server import SERVFAIL, SILENCE
from test.support.kzorpd import RULES, ZONES, kzorpd, lasting
from test.support.unprivileged import NOBODY, let_everybody_in, run_unprivileged
from Zorp.netfilter import daemon, daemon_policies
from Zorp.netfilter.policies import HostInstances
from Zorp.process.timers import Timers
from Zorp.rules.description import (
    ForwardData,
    InstanceDescription,
    ListenerData,
    ProxyData,
    ZoneData,
    from_json,
    parse_net,
    to_json,
)
from Zorp.rules.engine import RuleData
from Zorp.transport.kzorpd import KzorpdAway, KzorpdError, ask

__all__ = ["kzorpd", "lasting"]

NAMED = ZONES + '\nZone("partners", addrs=("198.51.100.0/24",), hostnames=("a.test",))'
RULE_FOR_PARTNERS = 'Rule(rule_id=2, service="web", proto=6, dst_port=80, src_zone="partners")'
OFFICE, PARTNERS = "zorp.4.office", "zorp.4.partners"


@pytest.fixture
def named(kzorpd):
    """kzorpd with a zone of a host name, not started, and its name server."""
    kzorpd.write_policy(NAMED, RULES + "\n" + RULE_FOR_PARTNERS)
    kzorpd.dns = kzorpd.name_server()
    kzorpd.dns.set("a.test", "A", "192.0.2.1", ttl=1)
    return kzorpd


def description(name="other", *, zone="lab", service="web", rule_zone="lab"):
    """What an instance hands over."""
    return InstanceDescription(
        instance=name, zones=(ZoneData(name=zone, nets=(parse_net("10.7.0.0/16"),)),),
        services=(ProxyData(name=service),),
        rules=(RuleData(rule_id=1, service=service, proto=(6,), dst_port=((81, 81),), src_zone=(rule_zone,)),),
        listeners=(ListenerData(6, "127.0.0.1", 50081),))


# ---------------------------------------------------------------- host names

def test_scenario_26_a_name_that_moves_takes_its_zone_along_and_touches_no_rule(named):
    # given a running kzorpd that knows the address of a name
    named.start()
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.1")
    rules = named.rules()
    assert rules
    # when the name gets another address
    named.dns.set("a.test", "A", "192.0.2.2", ttl=1)
    # then the set has the new one and not the old one, and the rules are as they were
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.2")
    assert named.rules() == rules
    named.log.wait_for("core.info", 4, "TTL for host expired, updating host", hostname="a.test")


def test_scenario_28_without_name_servers_static_zones_work_and_names_are_retried(named):
    # given a name server that says nothing
    named.dns.behaviour = SILENCE
    named.start()
    # then static zones are there at once
    assert named.sets()[OFFICE] == {"10.1.0.0/24"}
    assert named.sets()[PARTNERS] == {"198.51.100.0/24"}
    # and when it speaks, the name's address comes by itself
    named.dns.behaviour = "answer"
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.1")


def test_scenario_29_the_end_takes_host_names_out_of_the_zones_and_leaves_the_rest_where_the_site_wants_it(named):
    named.configure("on_stop: flush")
    named.start()
    named.ask("instance", description=to_json(dataclasses.replace(
        description(), zones=(ZoneData(name="office", nets=(parse_net("10.1.0.0/24"),)), ZoneData(
            name="partners", nets=(parse_net("198.51.100.0/24"),), hostnames=("a.test",))),
        rules=tuple(RuleData(rule_id=number, service="web", proto=(6,), src_zone=(zone,))
                    for number, zone in enumerate(("office", "partners"), 1)))))
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.1")
    rules = named.rules()
    assert named.stop(signal.SIGTERM) == 0
    assert named.sets()[PARTNERS] == {"198.51.100.0/24"}
    assert named.sets()[OFFICE] == {"10.1.0.0/24"}
    assert named.rules() == rules
    assert named.log.find("core.info", 1, "KZorpd shutting down...")
    assert not os.path.exists(named.socket)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_while_name_servers_are_away_keeps_the_addresses_until_the_first_answer(named, number):
    # given a name whose address is known
    named.start()
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.1")
    # when kzorpd ends, and comes back while the name server fails
    named.stop(number)
    assert named.sets()[PARTNERS] == {"198.51.100.0/24", "192.0.2.1"}
    named.dns.behaviour = SERVFAIL
    asked = len(named.dns.queries)
    named.start()
    assert named.dns.wait_for_queries(asked + 4)
    # then the zone has the address still
    assert named.sets()[PARTNERS] == {"198.51.100.0/24", "192.0.2.1"}
    # and the first answer decides, also when it is that the name does not exist
    named.dns.remove("a.test")
    named.dns.behaviour = "answer"
    named.wait_for_members(PARTNERS, "198.51.100.0/24")


def test_a_name_that_cannot_be_looked_up_keeps_its_last_address(named):
    named.start()
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.1")
    named.dns.behaviour = SERVFAIL
    asked = len(named.dns.queries)
    assert named.dns.wait_for_queries(asked + 4)
    named.log.wait_for("core.info", 3, "Could not resolve host name trying again after default timeout")
    assert named.sets()[PARTNERS] == {"198.51.100.0/24", "192.0.2.1"}


def test_an_address_of_names_of_two_zones_belongs_to_neither(named):
    named.write_policy(NAMED + '\nZone("friends", hostnames=("b.test",))',
                       RULES + "\n" + RULE_FOR_PARTNERS + "\n" + RULE_FOR_PARTNERS.replace("2,", "3,", 1).replace(
                           "partners", "friends").replace("80", "81"))
    named.dns.set("b.test", "A", "192.0.2.3", ttl=1)
    named.start()
    named.wait_for_members("zorp.4.friends", "192.0.2.3")
    # when the second name resolves to the address of the first
    named.dns.set("b.test", "A", "192.0.2.1", ttl=1)
    # then both zones lose it, for as long as the clash lasts
    named.wait_for_members("zorp.4.friends")
    named.wait_for_members(PARTNERS, "198.51.100.0/24")
    named.dns.set("b.test", "A", "192.0.2.4", ttl=1)
    named.wait_for_members("zorp.4.friends", "192.0.2.4")
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.1")


def test_two_denied_names_that_share_an_address_stay_denied(named):
    # given two zones of host names that nobody may reach, beside one that is forwarded
    named.write_policy('''
        Zone("internet", addrs=("0.0.0.0/0",))
        Zone("bad", hostnames=("a.test",))
        Zone("worse", hostnames=("b.test",))''', '''
        Rule(rule_id=1, service="web", proto=6, dst_port=80, dst_zone="internet")
        Rule(rule_id=2, service="no", proto=6, dst_port=80, dst_zone="bad")
        Rule(rule_id=3, service="no", proto=6, dst_port=80, dst_zone="worse")''')
    named.dns.set("b.test", "A", "192.0.2.3", ttl=1)
    named.start()
    named.wait_for_members("zorp.4.worse", "192.0.2.3")
    rules = named.rules()
    evaluate = "-e", "tcp", "10.1.0.2", "192.0.2.1", "lo", "--dst-port", "80"
    assert "Service: no\n" in named.command(*evaluate, program="kzorp").stdout
    # when the second name resolves to the address of the first
    named.dns.set("b.test", "A", "192.0.2.1", ttl=1)
    # then the address is in neither zone, nor in what is forwarded, and no rule has changed
    named.wait_for_members("zorp.4.internet", "0.0.0.0/1", "128.0.0.0/1", "192.0.2.1 nomatch")
    assert named.sets()["zorp.4.bad"] == named.sets()["zorp.4.worse"] == set()
    assert named.sets()["zorp.p4.bad"] == named.sets()["zorp.p4.worse"] == {"192.0.2.1"}
    assert named.rules() == rules
    # and that is said in the log, by `kzorp --zones` and by `kzorp --evaluate`
    line = named.log.wait_for("core.error", 2, "Host names of several zones have the same addresses")
    assert (line.fields["zones"], line.fields["addresses"]) == ("bad,worse", "192.0.2.1")
    shown = named.command("-z", program="kzorp").stdout
    assert "Zone name='bad', admin_parent='None' count='0'\n        disputed '192.0.2.1/255.255.255.255'\n" in shown
    answer = named.command(*evaluate, program="kzorp").stdout
    assert "Service: not found\n" in answer
    assert "Disputed: " in answer


def test_a_name_server_that_hangs_delays_no_request(named):
    named.dns.behaviour = SILENCE
    named.start()
    assert named.dns.wait_for_queries(1)
    before = time.monotonic()
    assert named.ask("hello")["mode"] == "compiled"
    assert time.monotonic() - before < 3.0       # the look-up gives up after four seconds


def test_addresses_of_the_firewall_itself_are_not_taken_from_a_name_server(named):
    named.dns.set("a.test", "A", "127.0.0.1", "192.0.2.7", ttl=1)
    named.start()
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.7")


# ---------------------------------------------------------------- reload

def test_scenario_27_a_syntax_error_in_the_zones_keeps_the_old_ones(kzorpd):
    # given zones in force
    kzorpd.start()
    sets, rules = kzorpd.sets(), kzorpd.rules()
    # when the file becomes wrong and kzorpd is told to reload
    (kzorpd.directory / "zones.py").write_text("Zone(\n")
    ended = kzorpd.command("--reload")
    # then the command fails and says why, the log too, and everything is as it was
    assert ended.returncode == 1
    assert "zones.py" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "zones.py" in kzorpd.log.find("core.error", 1, "Unable to load configuration, keep existing one")[0].raw
    assert (kzorpd.sets(), kzorpd.rules()) == (sets, rules)
    # and a right file is taken
    kzorpd.write_policy('Zone("office", addrs=("10.9.0.0/24",))')
    assert kzorpd.command("--reload").returncode == 0
    assert kzorpd.sets()[OFFICE] == {"10.9.0.0/24"}


def test_reload_answers_OK_only_when_it_is_done(kzorpd):
    kzorpd.start()
    assert kzorpd.say(b"RELOAD\n") == b"OK"
    (kzorpd.directory / "policy.py").write_text("raise ValueError('no')\n")
    assert kzorpd.say(b"RELOAD\n").startswith(b"FAIL ")


def test_requests_for_a_reload_that_come_together_are_all_answered(kzorpd):
    kzorpd.start()
    asking = [kzorpd.connect() for _ in range(5)]
    for sock in asking:
        sock.sendall(b"RELOAD\n")
    assert [sock.recv(100) for sock in asking] == [b"OK\n"] * 5
    assert [sock.recv(1) for sock in asking] == [b""] * 5        # closed, as ever
    for sock in asking:
        sock.close()


def test_HUP_reloads(kzorpd):
    kzorpd.start()
    kzorpd.write_policy('Zone("office", addrs=("10.9.0.0/24",))')
    kzorpd.kill(signal.SIGHUP)
    kzorpd.wait_for_members(OFFICE, "10.9.0.0/24")
    assert kzorpd.log.find("core.info", 1, "Received SIGHUP, reloading configuration")


def test_reload_without_a_running_kzorpd_fails(kzorpd):
    ended = kzorpd.command("--reload")
    assert ended.returncode == 1
    assert ended.stderr.startswith("kzorpd: kzorpd does not answer")


def test_a_policy_that_vanishes_while_kzorpd_is_away_keeps_its_rules(kzorpd):
    # given rules in force, and a kzorpd that is killed
    kzorpd.start()
    sets, rules = kzorpd.sets(), kzorpd.rules()
    kzorpd.stop(signal.SIGKILL)
    # when the policy is broken and kzorpd comes back
    (kzorpd.directory / "policy.py").write_text("def (\n")
    kzorpd.start()
    # then the rules are those that were in force, and the log says what is wrong
    assert (kzorpd.sets(), kzorpd.rules()) == (sets, rules)
    assert kzorpd.log.find("core.error", 1, "Unable to load configuration, keep existing one")


# ---------------------------------------------------------------- what instances hand over

def test_an_instance_that_hands_over_gets_its_rules(kzorpd):
    kzorpd.start()
    kzorpd.ask("instance", description=to_json(description()))
    assert kzorpd.sets()["zorp.4.lab"] == {"10.7.0.0/16"}
    assert any("50081" in rule for rule in kzorpd.rules())
    shown = kzorpd.command("-b", program="kzorp").stdout
    assert "Bind instance='other' protocol='6', address='127.0.0.1', port='50081'" in shown
    # and lose them when it is removed, the others staying
    kzorpd.ask("remove", instance="other")
    assert "zorp.4.lab" not in kzorpd.sets()
    assert OFFICE in kzorpd.sets()


def test_reload_takes_only_the_zones_of_an_instance_that_has_handed_over(kzorpd):
    # given that the instance of the file has handed over what it serves
    kzorpd.start()
    running = from_json(kzorpd.ask("dump")["instances"][0])
    kzorpd.ask("instance", description=to_json(running))
    # when both zones and rules of the file change and kzorpd reloads
    kzorpd.write_policy('Zone("office", addrs=("10.9.0.0/24",))', RULES.replace("80", "8080"))
    assert kzorpd.say(b"RELOAD\n") == b"OK"
    # then the zones are new and the rules wait for the instance
    now = from_json(kzorpd.ask("dump")["instances"][0])
    assert [str(net) for zone in now.zones for net in zone.nets] == ["10.9.0.0/24"]
    assert now.rules == running.rules


def test_a_zone_that_a_running_instance_needs_cannot_vanish(kzorpd):
    kzorpd.start()
    kzorpd.ask("instance", description=kzorpd.ask("dump")["instances"][0])
    sets = kzorpd.sets()
    kzorpd.write_policy('Zone("elsewhere", addrs=("10.9.0.0/24",))', RULES.replace("office", "elsewhere"))
    assert b"unknown zone 'office'" in kzorpd.say(b"RELOAD\n")
    assert kzorpd.sets() == sets


@pytest.mark.parametrize("text", [
    "", "nonsense", "[]", "{}", json.dumps({**json.loads(to_json(description())), "instance": "$(reboot)"}),
    to_json(description()).replace('"port":50081', '"port":0'),
    to_json(description()).replace('"lab"]', '"nosuch"]'),
    to_json(description()).replace("127.0.0.1", "192.0.2.1")])
def test_a_description_that_cannot_be_used_is_refused_and_changes_nothing(lasting, text):
    before = lasting.sets(), lasting.rules(), lasting.ask("dump")
    with pytest.raises(KzorpdError):
        lasting.ask("instance", description=text)
    assert (lasting.sets(), lasting.rules(), lasting.ask("dump")) == before


@pytest.fixture
def instances_user(kzorpd):
    """Ask a running kzorpd as the user that instances run as; returns what it answers, or why it refuses."""
    def attempt(request, **fields):
        os.chmod(kzorpd.socket, 0o666)
        let_everybody_in(kzorpd.directory)

        def asking():
            try:
                return ask(kzorpd.socket, request, 30, **fields)
            except KzorpdError as problem:
                return str(problem)
        return run_unprivileged(asking)
    return attempt


def test_the_user_of_instances_puts_only_in_force_what_the_policy_file_says(kzorpd, instances_user):
    # given a kzorpd that has read the policy of its only instance
    kzorpd.start()
    (text,) = kzorpd.ask("dump")["instances"]
    true, before = from_json(text), (kzorpd.sets(), kzorpd.rules())
    # when a process of the user of instances hands over somebody nobody knows, or more than the file says
    forward = RuleData(rule_id=7, service="fwd", proto=(6,))
    wider = dataclasses.replace(true.zones[0], nets=(parse_net("10.0.0.0/8"),))
    refusals = [instances_user("instance", description=to_json(wanted)) for wanted in (
        description(), dataclasses.replace(true, rules=(*true.rules, forward)),
        dataclasses.replace(true, zones=(wider,)), dataclasses.replace(true, rules=()))]
    # then each is refused with what differs and what to do, and nothing changes
    assert "'other' is not in instances.conf" in refusals[0]
    assert "--packet-rules administrator" in refusals[0]
    assert "hands over rule '7'" in refusals[1]
    assert "its policy file says no rule '7'" in refusals[1]
    assert "10.0.0.0/8" in refusals[2]
    assert "10.1.0.0/24" in refusals[2]
    assert "hands over no rule '1'" in refusals[3]
    assert (kzorpd.sets(), kzorpd.rules()) == before
    # and what the file says is taken, with the port that only the instance knows
    moved = dataclasses.replace(true, listeners=tuple(
        dataclasses.replace(listener, port=50_099) for listener in true.listeners))
    assert instances_user("instance", description=to_json(moved))["ok"]
    assert any("50099" in rule for rule in kzorpd.rules())


def test_the_user_of_instances_takes_no_rules_away_that_the_policy_file_has(kzorpd, instances_user):
    # given an instance that serves, as its policy file says
    kzorpd.start()
    kzorpd.ask("instance", description=kzorpd.ask("dump")["instances"][0])
    rules = kzorpd.rules()
    # when a process of the user of instances wants its rules, or anybody's, removed, then that is refused
    assert "wants its rules removed; its policy file has 1;" in instances_user("remove", instance="intra")
    kzorpd.ask("instance", description=to_json(description()))
    assert "'other' is not in instances.conf" in instances_user("remove", instance="other")
    kzorpd.ask("remove", instance="other")
    assert kzorpd.rules() == rules
    # and where there are none, or the file has none, there is nothing to refuse
    assert instances_user("remove", instance="other")["ok"]
    kzorpd.write_policy(rules="config.options.kzorp_enabled = FALSE\n" + RULES)
    assert instances_user("remove", instance="intra")["ok"]
    assert kzorpd.rules() == []


def test_where_rules_go_with_their_instance_its_own_word_closes_and_that_of_user_0_opens(kzorpd, instances_user):
    # given a site whose rules go with their instance, and one that proxies and one that forwards the same
    kzorpd.configure("on_stop: flush")
    kzorpd.namespace.sysctl("net.ipv4.ip_forward", "1")
    kzorpd.start()
    proxy = description()
    wide = dataclasses.replace(description("wide"), services=(ForwardData(name="fwd"),),
                               rules=(RuleData(rule_id=1, service="fwd"),))
    for wanted in (proxy, wide):
        kzorpd.ask("instance", description=to_json(wanted))
    evaluate = "-e", "tcp", "10.7.0.2", "10.2.0.2", "lo", "--dst-port", "81"
    assert "Service: web\n" in kzorpd.command(*evaluate, program="kzorp").stdout
    # when a process of the user of instances says that the first has stopped
    assert instances_user("stopped", instance="other")["ok"]
    # then what it took is dropped, and not left to the other one
    shown = kzorpd.command("-s", *evaluate, program="kzorp").stdout
    assert "Service name='web', flags='', type='DenyService'" in shown
    assert "Rule: 1\n" in shown
    assert "Service: web\n" in shown
    assert not any("TPROXY" in rule for rule in kzorpd.rules())
    # and when it starts again its rules are back
    kzorpd.ask("instance", description=to_json(proxy))
    assert any("TPROXY" in rule for rule in kzorpd.rules())
    # and user 0 is believed
    kzorpd.ask("stopped", instance="other")
    assert "Service: fwd\n" in kzorpd.command(*evaluate, program="kzorp").stdout


def test_an_instance_that_is_gone_from_instances_conf_loses_its_rules_when_kzorpd_starts(kzorpd):
    # given an instance that handed over and is not in instances.conf
    kzorpd.start()
    kzorpd.ask("instance", description=to_json(description()))
    assert "zorp.4.lab" in kzorpd.sets()
    # when kzorpd comes back
    kzorpd.stop(signal.SIGKILL)
    kzorpd.start()
    # then nothing of it is in force, and the others are
    assert "zorp.4.lab" not in kzorpd.sets()
    assert [from_json(text).instance for text in kzorpd.ask("dump")["instances"]] == ["intra"]


# ---------------------------------------------------------------- kzorp's orders

def test_upload_replaces_the_zones_and_flush_empties_them(kzorpd):
    kzorpd.start()
    (kzorpd.directory / "zones.txt").write_text("office;;10.3.0.0/16,10.4.0.0/16\nnew;office;\n")
    uploaded = kzorpd.command("-u", str(kzorpd.directory / "zones.txt"), program="kzorp")
    assert (uploaded.returncode, uploaded.stdout) == (0, "office\nnew\n")
    assert kzorpd.sets()[OFFICE] == {"10.3.0.0/16", "10.4.0.0/16"}
    assert kzorpd.command("-f", "zones", program="kzorp").returncode == 0
    assert kzorpd.sets().get(OFFICE, set()) == set()


def test_upload_that_takes_a_needed_zone_away_is_refused_with_1(kzorpd):
    kzorpd.start()
    (kzorpd.directory / "zones.txt").write_text("other;;10.3.0.0/16\n")
    uploaded = kzorpd.command("-u", str(kzorpd.directory / "zones.txt"), program="kzorp")
    assert (uploaded.returncode, uploaded.stdout) == (1, "")
    assert "unknown zone 'office'" in uploaded.stderr
    assert kzorpd.sets()[OFFICE] == {"10.1.0.0/24"}


# ---------------------------------------------------------------- the socket

@pytest.mark.parametrize("line", [b"\n", b"HELLO\n", b"{}\n", b'{"request": "quit"}\n', b'{"request": []}\n',
                                  b"\xff\xfe\n", b'{"request": "zones", "zones": [1]}\n', b"[" * 5000 + b"\n",
                                  b'{"request": "flush", "what": "everything"}\n', b'{"request": "remove"}\n'])
def test_a_request_that_makes_no_sense_is_refused(lasting, line):
    answer = json.loads(lasting.say(line))
    assert answer["ok"] is False
    assert answer["error"]
    assert lasting.ask("hello")


def test_mere_connects_change_nothing(lasting):
    mark = lasting.log.mark()
    for _ in range(200):
        lasting.connect().close()
    assert lasting.ask("hello")["ok"]
    assert lasting.log.lines()[mark:] == []


def test_connections_beyond_the_limit_are_closed_and_the_others_served(kzorpd):
    kzorpd.start()
    held = [kzorpd.connect() for _ in range(80)]
    closed, *_ = select.select(held, [], [], DEADLINE_S)
    assert closed
    assert [sock.recv(1) for sock in closed] == [b""] * len(closed)
    for sock in held:
        sock.close()
    wait_until(lambda: _answers(kzorpd), "an answer after the flood")


def _answers(kzorpd):
    try:
        return kzorpd.ask("hello")
    except KzorpdError:
        return None


def test_strangers_may_do_nothing_and_the_user_of_instances_only_what_instances_do(kzorpd):
    # given a socket that anybody can reach, and `nobody` as the user that instances run as
    kzorpd.start()
    os.chmod(kzorpd.socket, 0o666)
    let_everybody_in(kzorpd.directory)

    def attempt():
        refused = {}
        for request, fields in (("hello", {}), ("dump", {}), ("flush", {"what": "zones"}), ("zones", {"zones": []})):
            try:
                ask(kzorpd.socket, request, 10, **fields)
            except KzorpdError as problem:
                refused[request] = str(problem)
        return refused

    # then that user can ask who is there, and not see or change what others have
    assert run_unprivileged(attempt) == dict.fromkeys(("dump", "flush", "zones"), "permission denied")
    # and another user nothing at all
    kzorpd.stop()
    kzorpd.configure()
    (kzorpd.directory / "kzorp.yml").write_text((kzorpd.directory / "kzorp.yml").read_text().replace("nobody", "root"))
    kzorpd.start()
    os.chmod(kzorpd.socket, 0o666)
    assert run_unprivileged(attempt) == dict.fromkeys(("hello", "dump", "flush", "zones"), "permission denied")


def test_nobody_believes_a_false_kzorpd_of_the_user_of_instances(tmp_path):
    # given a directory of the user of instances, where a process of that user answers OK to everything
    tmp_path.chmod(0o777)
    let_everybody_in(tmp_path)
    path = str(tmp_path / "kzorpd")

    def serve():
        listening, kept = os.pipe()
        pid = os.fork()
        if pid:
            os.close(kept)
            os.read(listening, 1)
            return pid
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(path)
                sock.listen()
                os.write(kept, b"x")
                signal.pause()
        finally:
            os._exit(1)              # whatever happens: a child that returns would run the other tests again

    pid = serve()
    try:
        # then for us nobody answers
        with pytest.raises(KzorpdAway, match=f"user {NOBODY}"):
            ask(path, "reload", 5)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---------------------------------------------------------------- the process

def test_a_second_kzorpd_does_not_start(kzorpd):
    kzorpd.start()
    second = kzorpd.command("--no-syslog")
    assert second.returncode == 1
    assert "kzorpd is running already" in second.stderr
    assert kzorpd.ask("hello")


def test_the_service_manager_hears_of_it(kzorpd):
    # given a service manager that wants to hear from kzorpd every three seconds
    path = str(kzorpd.directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(10)
        kzorpd.start(environment={"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"})
        # then it hears that kzorpd is ready, and that it lives
        wait_until(lambda: manager.recv(200) == b"READY=1", "READY=1")
        wait_until(lambda: manager.recv(200) == b"WATCHDOG=1", "WATCHDOG=1")
        # and of a reload, and of the end
        kzorpd.kill(signal.SIGHUP)
        wait_until(lambda: manager.recv(200).startswith(b"RELOADING=1"), "RELOADING=1")
        wait_until(lambda: manager.recv(200) == b"READY=1", "READY=1")
        assert kzorpd.stop(signal.SIGINT) == 0
        wait_until(lambda: manager.recv(200) == b"STOPPING=1", "STOPPING=1")
    assert kzorpd.log.find("core.info", 1, "Received SIGINT, loading static zones")


def test_without_instances_it_runs_and_waits(kzorpd):
    (kzorpd.directory / "instances.conf").unlink()
    kzorpd.start()
    assert kzorpd.log.find("core.info", 1, "Unable to open instances.conf, falling back to configuration dir")
    assert kzorpd.log.find("core.info", 1, "Failed to set up zone handler, no static zones loaded")
    assert kzorpd.rules() == []


def test_a_host_with_listeners_only_keeps_its_packet_filter_to_itself(kzorpd):
    kzorpd.configure("mode: listeners")
    kzorpd.start()
    assert kzorpd.rules() == []
    assert kzorpd.ask("hello")["mode"] == "listeners"
    assert "Zone name='office'" in kzorpd.command("-z", program="kzorp").stdout


@pytest.mark.parametrize(("text", "complaint"), [("nosuch: 1", "unknown key 'nosuch'"), ("{", "not YAML")])
def test_settings_that_cannot_be_read_end_the_start_with_1(kzorpd, text, complaint):
    (kzorpd.directory / "kzorp.yml").write_text(text)
    ended = kzorpd.command("--no-syslog")
    assert ended.returncode == 1
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr


# ---------------------------------------------------------------- drift

def test_scenario_33_rules_that_another_program_flushes_come_back_and_the_log_says_so(kzorpd):
    kzorpd.start("--drift-check", "1")
    rules = kzorpd.rules()
    kzorpd.namespace.run("iptables", "-t", "mangle", "-F", "ZORP")
    assert kzorpd.rules() != rules
    line = kzorpd.log.wait_for("core.error", 1, "Packet rules were changed by another program")
    assert line.fields["restored"] == "yes"
    assert kzorpd.rules() == rules


def test_scenario_33_a_site_may_want_to_be_told_only(kzorpd):
    kzorpd.configure("on_drift: report")
    kzorpd.start("--drift-check", "1")
    rules = kzorpd.rules()
    kzorpd.namespace.run("iptables", "-t", "mangle", "-F", "ZORP")
    line = kzorpd.log.wait_for("core.error", 1, "Packet rules were changed by another program")
    assert line.fields["restored"] == "no"
    assert kzorpd.rules() != rules


def test_a_reload_brings_flushed_rules_back(kzorpd):
    # given rules that somebody flushed, and no look at them for long
    kzorpd.start("--drift-check", "3600")
    rules = kzorpd.rules()
    kzorpd.namespace.run("iptables", "-t", "mangle", "-F", "ZORP")
    # when it is told to reload, the policies being what they were
    assert kzorpd.command("--reload").returncode == 0
    # then its success is true
    assert kzorpd.rules() == rules


def test_a_reload_that_may_not_repair_fails_with_the_reason(kzorpd):
    kzorpd.configure("on_drift: report")
    kzorpd.start("--drift-check", "3600")
    kzorpd.namespace.run("iptables", "-t", "mangle", "-F", "ZORP")
    reload = kzorpd.command("--reload")
    assert reload.returncode == 1
    assert "packet rules were changed by another program and stay so (on_drift is report)" in reload.stderr


# ---------------------------------------------------------------- beside kzorp-setup, and the host

@pytest.fixture
def once_named(named):
    """A host whose kzorpd knew a host name and ended, and whose kernel has no rules any more."""
    named.start()
    named.wait_for_members(PARTNERS, "198.51.100.0/24", "192.0.2.1")
    named.stop(signal.SIGKILL)
    assert named.command("unload", program="kzorp-setup").returncode == 0
    assert named.sets() == {}
    return named


@pytest.mark.parametrize("command", ["load", "boot"])
def test_kzorp_setup_knows_the_addresses_that_kzorpd_knew_last(once_named, command):
    loaded = once_named.command(command, program="kzorp-setup")
    assert (loaded.returncode, "core.error" in loaded.stderr) == (0, False)
    assert once_named.sets()[PARTNERS] == {"198.51.100.0/24", "192.0.2.1"}
    assert "192.0.2.1/32" in once_named.command("print", program="kzorp-setup").stdout
    assert once_named.command("status", program="kzorp-setup").stdout == "in force\n"


def test_addresses_that_cannot_be_read_are_one_line_and_no_addresses(once_named):
    (once_named.directory / "host-names.json").write_text("{")
    loaded = once_named.command("load", program="kzorp-setup")
    assert loaded.returncode == 0
    (line,) = [line for line in loaded.stderr.splitlines() if not line.startswith("warning: ")]
    assert "Addresses of host names cannot be read, starting without them; file='" in line
    assert once_named.sets()[PARTNERS] == {"198.51.100.0/24"}


def test_rules_that_refuse_by_host_name_are_named_when_they_are_checked_and_loaded(kzorpd):
    kzorpd.write_policy(ZONES + '\nZone("bad", hostnames=("a.test",))', RULES + (
        '\nRule(rule_id=2, service="no", proto=6, dst_port=80, src_zone="office", dst_zone="bad")'))
    warning = ("warning: instance 'intra', rule 2 (service 'no') restricts zone 'bad' by host name; while a.test has "
               "no known address, rule 1 (service 'web') takes its connections; repair: ")
    assert warning in kzorpd.command("check", program="kzorp-setup").stdout
    loaded = kzorpd.command("load", program="kzorp-setup")
    assert loaded.returncode == 0
    assert warning in loaded.stderr


def test_kzorp_setup_leaves_the_rules_to_a_running_kzorpd(kzorpd):
    kzorpd.start()
    kzorpd.write_policy('Zone("office", addrs=("10.9.0.0/24",))')
    assert kzorpd.command("load", program="kzorp-setup").stdout == "kzorpd has read the policies again\n"
    assert kzorpd.sets()[OFFICE] == {"10.9.0.0/24"}
    refused = kzorpd.command("unload", program="kzorp-setup")
    assert refused.returncode == 1
    assert "stop it first" in refused.stderr
    assert kzorpd.rules()


def test_scenario_32_marks_that_sockets_inherit_are_reported_and_routed_around(kzorpd):
    kzorpd.namespace.sysctl("net.ipv4.tcp_fwmark_accept", "1")
    kzorpd.start()
    assert kzorpd.log.find("core.error", 2, "warning: accepted sockets inherit the mark of diverted packets")
    assert "iif lo" in kzorpd.namespace.run("ip", "rule").stdout


def test_a_host_that_does_not_forward_is_told_the_command_that_repairs_it(kzorpd):
    kzorpd.write_policy(rules=RULES + '\nRule(rule_id=2, service="fwd", proto=6, dst_port=700, src_zone="office")')
    kzorpd.namespace.sysctl("net.ipv4.ip_forward", "0")
    kzorpd.start()
    line = kzorpd.log.find("core.error", 1, "Unable to load configuration, keep existing one")[0]
    assert "sysctl -w net.ipv4.ip_forward=1" in line.raw
    assert kzorpd.rules() == []


def test_rules_that_a_host_could_not_take_at_the_start_follow_when_it_is_repaired(kzorpd):
    # given forwarding rules in force, handed over by their instance
    kzorpd.write_policy(rules=RULES + '\nRule(rule_id=2, service="fwd", proto=6, dst_port=700, src_zone="office")')
    kzorpd.namespace.sysctl("net.ipv4.ip_forward", "1")
    kzorpd.start()
    kzorpd.ask("instance", description=kzorpd.ask("dump")["instances"][0])
    rules = kzorpd.rules()
    kzorpd.stop(signal.SIGKILL)
    # when kzorpd comes back on a host that does not forward any more and has no rules
    kzorpd.namespace.sysctl("net.ipv4.ip_forward", "0")
    kzorpd.namespace.run("iptables", "-t", "mangle", "-F")
    kzorpd.start("--drift-check", "1")
    kzorpd.log.wait_for("core.error", 3, "Packet rules are still not in force")
    assert len(kzorpd.ask("dump")["instances"]) == 1
    # then the rules come when it forwards again
    kzorpd.namespace.sysctl("net.ipv4.ip_forward", "1")
    wait_until(lambda: kzorpd.rules() == rules, "the rules")


def test_a_reload_that_meets_a_byte_0_in_instances_conf_fails_and_the_next_one_is_done(kzorpd):
    # given a running kzorpd and an instances.conf with a byte 0
    kzorpd.start()
    conf = kzorpd.directory / "instances.conf"
    good = conf.read_text()
    conf.write_text(good.replace("--policy", "--policy \0", 1))
    # when it reloads, then that is refused in time
    with pytest.raises(KzorpdError, match="no word can have a byte of value 0"):
        ask(str(kzorpd.directory / "kzorpd"), "reload", 20)
    # and with the file mended it is done
    conf.write_text(good)
    assert ask(str(kzorpd.directory / "kzorpd"), "reload", 20)["ok"]


def test_a_reading_that_ends_with_a_defect_leaves_the_next_one_possible(monkeypatch, tmp_path):
    # given instances.conf that a defect makes unreadable, and somebody who cannot cope with what was read
    results, defects = [], [ZeroDivisionError("defect")]

    def read_instances(config_dir):
        if defects:
            raise defects.pop()
        return HostInstances(config_dir, ())

    def refuse(found):
        raise ZeroDivisionError

    monkeypatch.setattr(daemon_policies, "read_instances", read_instances)
    with selectors.DefaultSelector() as selector:
        reader = daemon_policies.PolicyReader(str(tmp_path), selector, Timers())
        # when policies are read, again and again
        for done in (results.append, refuse, results.append):
            reader.read(done)
    # then everybody is told, the first one of the defect
    assert [found.problems for found in results] == [["ZeroDivisionError: defect"], []]


@pytest.mark.parametrize(("arguments", "said"), [
    (("--name-server", "garbage"), "Invalid name server; server='garbage'"),
    (("--least-ttl", "0"), "at least 1 second was expected, not 0"),
    (("--drift-check", "-30"), "at least 1 second was expected, not -30")])
def test_a_number_or_name_server_that_makes_no_sense_is_a_wrong_command_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        daemon.main(list(arguments))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
