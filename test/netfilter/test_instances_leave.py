"""Instances that instances.conf does not name any more, or not at the moment: what becomes of their rules."""

import signal

import pytest

from test.support.kzorpd import POLICY, Kzorpd
from test.support.leaks import connected
from test.support.net import SERVER, net

__all__ = ["net"]
pytestmark = pytest.mark.netns

RULES = """
    Rule(rule_id=1, service="web", proto=6, dst_port=80)
    Rule(rule_id=2, service="no", proto=6, dst_port=81)
    Rule(rule_id=3, service="fwd", proto=6, dst_port=700)
"""
WIDE = POLICY.replace("def intra()", "def wide()") + '    Rule(rule_id=1, service="fwd", proto=6)\n'
TARGETS = PROXIED, DENIED, FORWARDED, NO_RULE = [(SERVER, port) for port in (80, 81, 700, 701)]
LEFT = "Instance left instances.conf, what its rules took is dropped"


@pytest.fixture(params=["nft", "legacy-restore"])
def gateway(request, net):
    """A kzorpd between client and server, on a host that forwards everything without it; its instance runs."""
    made = Kzorpd(net.firewall.directory, net.firewall)
    made.net, made.conf = net, made.directory / "instances.conf"
    made.configure(f"backend: {request.param}\ndefault_deny: false")
    made.write_policy(rules=RULES)
    net.firewall.backend = request.param
    for address, port in TARGETS:
        net.server.listen(address, port).answer_all(b"hello")
    made.start()
    made.ask("instance", description=made.ask("dump")["instances"][0])
    assert passing(made) == [FORWARDED, NO_RULE]
    yield made
    made.end()


def passing(gateway):
    return connected(gateway.net.client, TARGETS, within_s=0.4)


def in_kernel(gateway):
    kind = "legacy" if "legacy" in gateway.net.firewall.backend else "nft"
    lines = gateway.net.firewall.run(f"iptables-{kind}-save").stdout.splitlines()
    return [line.split(" [")[0] for line in lines if "ZORP" in line]


def test_a_reload_without_instances_conf_fails_and_changes_nothing(gateway):
    # given an instances.conf that is renamed for a moment
    rules = in_kernel(gateway)
    gateway.conf.rename(f"{gateway.conf}~")
    # when kzorpd reloads, then it says so in one line, and everything is as before
    reload = gateway.command("--reload")
    assert reload.returncode == 1
    line, = reload.stderr.splitlines()
    assert "instances.conf cannot be read, packet rules stay as they are" in line
    assert in_kernel(gateway) == rules
    # and so it is when kzorpd starts
    gateway.stop(signal.SIGKILL)
    gateway.start()
    assert in_kernel(gateway) == rules
    assert passing(gateway) == [FORWARDED, NO_RULE]
    # and with the file back the reload is done
    gateway.conf.with_name("instances.conf~").rename(gateway.conf)
    assert gateway.command("--reload").returncode == 0
    assert in_kernel(gateway) == rules


def test_an_empty_instances_conf_closes_what_rules_took_and_opens_nothing(gateway):
    # given an instances.conf that is written anew, and empty for a moment
    rules, text = in_kernel(gateway), gateway.conf.read_text()
    gateway.conf.write_text("")
    # when kzorpd reloads, or starts, just then
    assert gateway.command("--reload").returncode == 0
    # then nothing passes that a rule took, and the log says what to do
    assert passing(gateway) == [NO_RULE]
    assert "kzorp-setup unload" in gateway.log.find("core.error", 1, LEFT)[0].raw
    gateway.stop(signal.SIGKILL)
    gateway.start()
    assert passing(gateway) == [NO_RULE]
    # and with its line the instance has its rules again
    gateway.conf.write_text(text)
    assert gateway.command("--reload").returncode == 0
    assert passing(gateway) == [FORWARDED, NO_RULE]
    assert sum("TPROXY" in rule for rule in in_kernel(gateway)) == sum("TPROXY" in rule for rule in rules) > 0


def test_user_0_takes_the_last_rules_out_with_kzorp_setup(gateway):
    # given a host whose last instance is gone from instances.conf
    gateway.conf.write_text("")
    gateway.stop()
    gateway.start()
    assert PROXIED not in passing(gateway)
    # when kzorpd is stopped and user 0 unloads, then nothing of it comes back
    gateway.stop()
    assert gateway.command("unload", program="kzorp-setup").returncode == 0
    gateway.start()
    assert in_kernel(gateway) == []


def test_a_shortened_instances_conf_leaves_nothing_of_one_instance_to_the_rules_of_another(gateway):
    # given another instance, which forwards what nobody else takes
    (gateway.directory / "wide.py").write_text(WIDE)
    line = gateway.conf.read_text()
    wide = line.replace("intra", "wide").replace("policy.py", "wide.py")
    gateway.conf.write_text(line + wide)
    assert gateway.command("--reload").returncode == 0
    assert passing(gateway) == [FORWARDED, NO_RULE]
    # when the line of the first one is missing at a reload
    gateway.conf.write_text(wide)
    assert gateway.command("--reload").returncode == 0
    # then what it proxied or refused is not forwarded
    assert passing(gateway) == [NO_RULE]
    assert "restart kzorpd" in gateway.log.find("core.error", 1, LEFT)[0].raw
    # and when user 0 restarts kzorpd, its rules go
    gateway.stop()
    gateway.start()
    assert passing(gateway) == TARGETS
