"""What cannot be loaded: one error that names the object, exit status 1, and the rules in force stay as they are."""

from __future__ import annotations

import sys

import pytest

from test.support.daemon import ROOT
from test.support.net import network, policy

pytestmark = pytest.mark.netns

GOOD = """
    Service("web", PlugProxy)
    PFService("fwd")
    Rule(rule_id=1, proto=6, dst_port=80, service="web")
    Rule(rule_id=2, proto=6, dst_port=700, service="fwd")
    """
LISTENERS = "config.options.rule_listen_port = 50080\n"


@pytest.fixture(scope="module")
def in_use(tmp_path_factory):
    """A firewall with rules in force, which no test may change, and a second instance whose policy says the same."""
    with network(tmp_path_factory.mktemp("firewall")) as net:
        net.firewall.configure("nft")
        for name in ("intra", "inter"):
            net.firewall.add_zorp(policy(GOOD, LISTENERS, instance=name), name)
        net.firewall.setup("load")
        yield net.firewall, in_force(net.firewall)


@pytest.fixture
def firewall(in_use):
    """The firewall as it is in use, with the files that it was loaded from."""
    firewall, loaded = in_use
    firewall.daemons[1].write_policy(policy(GOOD, LISTENERS, instance="inter"))
    firewall.write_settings()
    assert in_force(firewall) == loaded
    return firewall


def rule(text: str):
    """Return the fault of a second instance with one more rule."""
    def write(firewall) -> None:
        firewall.daemons[1].write_policy(policy(f"{GOOD}Rule(rule_id=7, {text}, service='fwd')\n", LISTENERS,
                                                instance="inter"))
    return write


def instances(line: str):
    """Return the fault of one more line in instances.conf."""
    def write(firewall) -> None:
        firewall.write_settings()
        with open(firewall.directory / "instances.conf", "a") as file:
            file.write(line.format(policy=firewall.daemons[0].policy) + "\n")
    return write


def no_instances(firewall) -> None:
    firewall.write_settings()
    (firewall.directory / "instances.conf").unlink()


FAULTS = {
    "an interface of many": (rule("iface='eth+'"), ["instance 'inter', rule 7", "interface name 'eth+'"]),
    "an unknown group": (rule("ifgroup='nowhere'"), ["inter", "nowhere"]),
    "an interface name that is too long": (rule("iface='abcdefghijklmnopq'"), ["inter", "abcdefghijklmnopq"]),
    "an unknown zone": (rule("src_zone='nowhere'"), ["inter", "nowhere"]),
    "a combination without packet form": (rule("proto=1, icmp_code=3"), ["instance 'inter', rule 7", "ICMP code"]),
    "two rules of one number": (rule("dst_port=80, service='fwd')\n    Rule(rule_id=7"), ["inter", "7"]),
    "an instance twice": (instances("intra --policy {policy}"), ["instances.conf", "intra"]),
    "a line that is none": (instances("other --policy 'unfinished"), ["instances.conf:3"]),
    "a policy that is not there": (instances("other --policy /nowhere/policy.py"), ["other", "/nowhere/policy.py"]),
    "no instances.conf": (no_instances, ["instances.conf"]),
}


def in_force(firewall) -> list[str]:
    commands = "iptables-nft-save", "ip6tables-nft-save", "ipset save", "ip rule", "ip -6 rule"
    return [line for command in commands for line in firewall.run(*command.split()).stdout.splitlines()
            if line[:1] not in "#:"]


def refused(firewall, *words: str) -> list[str]:
    """Run kzorp-setup load, in these words; return what it says when it is refused and changes nothing."""
    before = in_force(firewall)
    setup = [sys.executable, str(ROOT / "sbin" / "kzorp-setup"), "--config-dir", str(firewall.directory), "load"]
    result = firewall.run(*words, *setup, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert in_force(firewall) == before
    return [line for line in result.stderr.splitlines() if not line.startswith("warning:")]


@pytest.mark.parametrize(("fault", "named"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_named_and_nothing_changes(firewall, fault, named):
    fault(firewall)
    problem, = refused(firewall)
    assert problem.startswith("kzorp-setup: ")
    for text in named:
        assert text in problem


def test_a_missing_capability_is_named_and_nothing_changes(firewall):
    rule("dst_port=9")(firewall)
    problem, = refused(firewall, "setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
    assert "CAP_NET_ADMIN" in problem


def test_a_refusal_by_netlink_names_the_set_and_nothing_changes(firewall):
    # given a set of the site that has the name of one that is needed now, and is of another family
    firewall.daemons[1].write_policy(policy(
        GOOD + "Rule(rule_id=7, src_zone='office', service='fwd')\n", LISTENERS + "Zone('office', ['10.9.0.0/24'])\n",
        instance="inter"))
    firewall.write_settings()
    name, = {word for line in firewall.setup("print").stdout.splitlines() for word in line.split()
             if word.startswith("zorp.4.office")}
    firewall.run("ipset", "create", name, "hash:net", "family", "inet6")
    # when the rules are loaded
    problem, = refused(firewall)
    firewall.run("ipset", "destroy", name)
    # then the set is named
    assert name in problem
