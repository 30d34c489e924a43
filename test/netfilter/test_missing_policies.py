"""Rules of one instance without those of another: what may be forwarded meanwhile."""

import dataclasses
import signal

import pytest

from test.support.kzorpd import POLICY, RULES, kzorpd
from Zorp.rules.description import ForwardData, InstanceDescription, ListenerData, ProxyData, from_json, to_json
from Zorp.rules.engine import RuleData
from Zorp.transport.kzorpd import KzorpdError

__all__ = ["kzorpd"]

WIDE = POLICY.replace("def intra()", "def wide()") + '    Rule(rule_id=1, service="fwd", proto=6)\n'
EXISTING = "Unable to load configuration, keep existing one"


@pytest.fixture
def two(kzorpd):
    """An instance whose proxy takes port 80, and `wide`, which forwards all TCP, both in instances.conf."""
    kzorpd.namespace.sysctl("net.ipv4.ip_forward", "1")
    kzorpd.namespace.sysctl("net.ipv6.conf.all.forwarding", "1")
    (kzorpd.directory / "wide.py").write_text(WIDE)
    instances = kzorpd.directory / "instances.conf"
    line = instances.read_text()
    instances.write_text(line + line.replace("intra", "wide").replace("policy.py", "wide.py"))
    return kzorpd


def wide(*, service="fwd"):
    """What `wide` hands over when it starts."""
    return InstanceDescription(
        instance="wide", services=(ForwardData(name="fwd"), ProxyData(name="web")),
        rules=(RuleData(rule_id=1, service=service, proto=(6,)),), listeners=(ListenerData(6, "127.0.0.1", 50_081),))


def in_force(kzorpd):
    return [from_json(text).instance for text in kzorpd.ask("dump")["instances"]]


def test_nothing_more_is_forwarded_while_a_policy_is_broken_whose_rules_nobody_knows(two):
    # given a broken policy that was never in force, beside a good one that forwards everything
    two.write_policy(rules="Rule(service='nobody')")
    # when kzorpd starts
    two.start()
    # then nothing is in force, and the log says why
    assert two.rules() == []
    assert any("rule 1 might forward what the policy of instance" in line.raw
               for line in two.log.find("core.error", 1, EXISTING))
    # and that instance cannot have its rules by starting, either, unless it only has proxies
    with pytest.raises(KzorpdError, match="policy of instance 'intra'"):
        two.ask("instance", description=to_json(wide()))
    assert two.rules() == []
    two.ask("instance", description=to_json(wide(service="web")))
    assert in_force(two) == ["wide"]
    two.ask("remove", instance="wide")
    # and once the policy is repaired, both are in force
    two.write_policy()
    assert two.say(b"RELOAD\n") == b"OK"
    assert sorted(in_force(two)) == ["intra", "wide"]
    two.ask("instance", description=to_json(wide()))


def test_a_line_of_instances_conf_that_makes_no_sense_may_be_anybody(two):
    instances = two.directory / "instances.conf"
    instances.write_text(instances.read_text().replace("intra --policy", "intra --policy 'unfinished"))
    two.start()
    assert two.rules() == []
    assert any("of a line of instances.conf" in line.raw for line in two.log.find("core.error", 1, EXISTING))


def test_who_forwards_already_goes_on_and_reloads_beside_a_new_broken_instance(two):
    # given rules in force that forward
    instances = two.directory / "instances.conf"
    both = instances.read_text()
    instances.write_text(both.splitlines()[1] + "\n")
    two.start()
    two.ask("instance", description=to_json(wide()))
    rules = two.rules()
    # when a broken instance is added, and kzorpd reloads or comes back
    instances.write_text(both)
    two.write_policy(rules="Rule(service='nobody')")
    assert two.say(b"RELOAD\n").startswith(b"FAIL")
    assert two.rules() == rules
    two.stop(signal.SIGKILL)
    two.start()
    # then the rules are as before, and their instance may reload, but not forward more
    assert two.rules() == rules
    two.ask("instance", description=to_json(wide()))
    more = dataclasses.replace(wide(), rules=(*wide().rules, RuleData(rule_id=2, service="fwd", proto=(17,))))
    with pytest.raises(KzorpdError, match="'wide', rule 2 might forward"):
        two.ask("instance", description=to_json(more))
    assert two.rules() == rules


NARROW = POLICY.replace("def intra()", "def wide()") + """    Rule(rule_id=1, service="fwd", proto=6, src_zone="office")
    Rule(rule_id=2, service="no", proto=6, dst_port=80, src_zone="office")
"""


@pytest.mark.parametrize("change", ["a zone grows", "a denial goes", "the instance goes that keeps something"])
def test_while_a_policy_is_unknown_zones_and_denials_stay_as_they_are(two, change):
    # given an instance whose rule forwards from a zone what another rule does not refuse, and one that has a proxy
    wide_file, zones, instances = (two.directory / name for name in ("wide.py", "zones.py", "instances.conf"))
    wide_file.write_text(NARROW)
    instances.write_text(instances.read_text().replace("intra", "kept"))
    two.write_policy()
    (two.directory / "policy.py").write_text((two.directory / "policy.py").read_text().replace("def intra", "def kept"))
    two.start()
    before = two.sets(), two.rules()
    assert before[1]
    # when another one comes whose policy is broken, and something that might open changes
    (two.directory / "broken.py").write_text("def (")
    line = instances.read_text().splitlines()[0]
    both = instances.read_text() + line.replace("policy.py", "broken.py").replace("kept", "broken") + "\n"
    instances.write_text(both)
    if change == "a zone grows":
        zones.write_text(zones.read_text().replace("10.1.0.0/24", "10.0.0.0/8"))
    elif change == "a denial goes":
        wide_file.write_text("\n".join(NARROW.splitlines()[:-1]) + "\n")
    else:
        instances.write_text("\n".join(both.splitlines()[1:]) + "\n")
    # then nothing of it comes into force: neither by a reload, nor when kzorpd starts
    assert two.say(b"RELOAD\n").startswith(b"FAIL")
    two.stop(signal.SIGKILL)
    two.start()
    assert (two.sets(), two.rules()) == before
    assert any("what the policy of instance" in line.raw for line in two.log.find("core.error", 1, EXISTING))


def test_packets_for_proxies_that_never_ran_are_dropped_and_not_forwarded_by_others(two):
    # given an instance without ports of its own, because it has never run
    two.write_policy()
    policy = two.directory / "policy.py"
    policy.write_text(policy.read_text().replace("config.options.rule_listen_port = 50080", ""))
    # when kzorpd puts the rules of both in force
    two.start()
    assert sorted(in_force(two)) == ["intra", "wide"]
    # then the proxy's rule stands before the other, and leads to a drop
    rules = two.rules()
    assert not any("TPROXY" in rule for rule in rules)
    assert "-A ZORP_I1 -j DROP" in rules
    said = two.command("-e", "tcp", "10.1.0.2", "10.2.0.2", "lo", "--dst-port", "80", program="kzorp").stdout
    assert "Service: web" in said


# ---------------------------------------------------------------- instances that stop

def test_an_instance_that_stops_keeps_its_rules(kzorpd):
    kzorpd.start()
    rules = kzorpd.rules()
    kzorpd.ask("stopped", instance="intra")
    assert kzorpd.rules() == rules != []


def test_where_the_site_wants_it_an_instance_has_rules_only_while_it_runs(two):
    # given a site that wants rules to go with their instance
    two.configure("on_stop: flush")
    two.write_policy(rules=RULES)
    # when kzorpd starts and reloads, then there are none
    two.start()
    assert two.say(b"RELOAD\n") == b"OK"
    assert two.rules() == []
    # when an instance starts, then they come; kzorpd's own end and return leave them
    two.ask("instance", description=to_json(wide(service="web")))
    rules = two.rules()
    assert any("50081" in rule for rule in rules)
    two.stop()
    two.start()
    assert two.rules() == rules
    # and when it stops, they go
    two.ask("stopped", instance="wide")
    assert two.rules() == []
