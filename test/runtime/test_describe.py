"""zorp --describe: the policy as the packet filter's side gets it."""

import json
import subprocess

import pytest

from Zorp.rules.description import ForwardData, ListenerData, NatData, ZoneData, from_json, parse_net
from Zorp.rules.engine import RuleData

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("office", ["10.1.0.0/24", "2001:db8::/32"])
    Zone("lab", "10.1.0.64/26", admin_parent="office")
    NATPolicy("hide", nat=GeneralNAT([
        (InetSubnet("10.1.0.0/24"), InetSubnet("0.0.0.0/0"), InetSubnet("192.0.2.0/24"))]))

    def intra():
        config.options.rule_listen_port = $rule_port
        Service("web", PlugProxy)
        PFService("fwd", router=DirectedRouter(SockAddrInet("10.2.0.2", 7000), forge_addr=TRUE), snat_policy="hide")
        Rule(src_zone="lab", dst_port=80, service="web")
        Rule(rule_id=5, service="fwd")
        $more
    """


def described(zorp, **values):
    daemon = zorp(POLICY, start=False, **{"rule_port": 50080, "more": "", **values})
    return daemon, subprocess.run([*daemon.command, "--describe", "--verbose", "3"], capture_output=True, text=True,
                                  timeout=30)


def test_description_says_everything(zorp):
    _, result = described(zorp)
    assert result.returncode == 0, result.stderr
    description = from_json(result.stdout)
    assert description.instance == "intra"
    assert description.zones == (
        ZoneData(name="office", nets=(parse_net("10.1.0.0/24"), parse_net("2001:db8::/32"))),
        ZoneData(name="lab", parent="office", nets=(parse_net("10.1.0.64/26"),)))
    assert description.service("fwd") == ForwardData(
        name="fwd", router=("10.2.0.2", 7000), forge_addr=True,
        snat=(NatData(*map(parse_net, ("10.1.0.0/24", "0.0.0.0/0", "192.0.2.0/24"))),))
    assert description.rules == (RuleData(rule_id=1, service="web", dst_port=((80, 80),), src_zone=("lab",)),
                                 RuleData(rule_id=5, service="fwd"))
    assert ListenerData(6, "127.0.0.1", 50080) in description.listeners


def test_port_of_the_last_run_is_known(zorp):
    # given an instance that ran with a port of the host's choice
    daemon = zorp(POLICY, rule_port=0, more="")
    chosen = json.loads((daemon.directory / "ports-intra.json").read_text())
    daemon.stop()
    # when it is described
    result = subprocess.run([*daemon.command, "--describe"], capture_output=True, text=True, timeout=30)
    # then the ports are those
    assert {listener.port for listener in from_json(result.stdout).listeners} == set(chosen.values())


@pytest.mark.parametrize(("more", "text"), [
    ("Rule(service='nothing')", "No valid service was specified for the rule; service='nothing'"),
    ("NATPolicy('old', nat=GeneralNAT([(InetSubnet('10.0.0.0/8'), InetSubnet('10.0.0.0/8'))])); "
     "PFService('x', dnat_policy='old')", "old-style mapping parameter does not support KZorp"),
])
def test_policy_that_cannot_be_described(zorp, more, text):
    _, result = described(zorp, more=more)
    assert result.returncode == 2
    assert result.stdout == ""
    assert text in result.stderr
