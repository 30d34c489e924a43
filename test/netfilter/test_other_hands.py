"""A host that is not as it should be: two back ends in turn, full disks, foreign rules that name our chains."""

import contextlib

import pytest

from test.support.kzorpd import Kzorpd
from test.support.net import SERVER, net, policy

__all__ = ["net"]
pytestmark = pytest.mark.netns

OLD, NEW = (policy(f"Service('web', PlugProxy)\nRule(proto=6, dst_port={port}, service='web')") for port in (80, 81))


@pytest.fixture(params=["nft", "legacy-restore"])
def backend(request, net):
    net.firewall.configure(request.param)
    return request.param


def saved(net):
    """The rules of both kinds of tables, without counters."""
    texts = (net.firewall.run(f"iptables-{kind}-save").stdout for kind in ("nft", "legacy"))
    return [line.partition(" [")[0] for text in texts for line in text.splitlines() if not line.startswith("#")]


def test_another_back_end_is_refused_while_rules_of_the_first_are_there(net, backend):
    # given rules that were loaded with one back end
    net.firewall.start_zorp(OLD)
    rules = saved(net)
    # when the site sets the other one
    net.firewall.backend = {"nft": "legacy-restore", "legacy-restore": "nft"}[backend]
    refused = net.firewall.setup("load", check=False)
    # then nothing changes, and the message says how to go about it
    assert refused.returncode == 1
    assert f"set backend: {backend} in kzorp.yml, run kzorp-setup unload" in refused.stderr
    assert saved(net) == rules
    # and having done so it works
    net.firewall.backend, other = backend, net.firewall.backend
    net.firewall.setup("unload")
    net.firewall.backend = other
    assert net.firewall.setup("load").stdout.startswith("loaded")
    assert net.firewall.setup("status").stdout == "in force\n"


def test_a_state_that_cannot_be_stored_leaves_the_kernel_as_it_was(net, backend):
    # given rules in force, and a state directory that takes no new file
    daemon = net.firewall.start_zorp(OLD)
    rules = saved(net)
    (net.firewall.directory / "packet-rules.json.new").mkdir()
    # when another policy is loaded
    daemon.write_policy(NEW)
    refused = net.firewall.setup("load", check=False)
    # then it is refused, and what is in force is what is stored
    assert refused.returncode == 1
    assert "Cannot write the state of the packet rules" in refused.stderr
    assert saved(net) == rules
    assert net.firewall.setup("status").stdout == "in force\n"
    # and the same holds for unloading
    assert net.firewall.setup("unload", check=False).returncode == 1
    assert saved(net) == rules


def test_a_foreign_rule_that_names_a_chain_which_has_to_go_is_named_and_changes_nothing(net, backend):
    # given a rule of the site that leads into a chain of ours that the next policy does not have
    daemon = net.firewall.start_zorp(policy("DenyService('no')\nRule(proto=6, dst_port=80, service='no')"))
    net.firewall.iptables("-N", "SITE", "-t", "mangle")
    net.firewall.iptables("-A", "SITE", "-t", "mangle", "-j", "ZORP_R1")
    rules = saved(net)
    daemon.write_policy(OLD)
    # when that policy is loaded
    refused = net.firewall.setup("load", check=False)
    # then the chain is named, and the old rules are in force
    assert refused.returncode == 1
    assert "ZORP_R1" in refused.stderr
    assert saved(net) == rules
    assert net.firewall.setup("status").stdout == "in force\n"
    # and without the site's rule it works
    net.firewall.iptables("-F", "SITE", "-t", "mangle")
    assert net.firewall.setup("load").stdout.startswith("loaded")


OVERTAKEN = [("filter", "FORWARD", "ZORP_FORWARD", ["-j", "ACCEPT"]), ("mangle", "PREROUTING", "ZORP", ["-j", "SITE"])]


@pytest.mark.parametrize(("table", "builtin", "ours", "rule"), OVERTAKEN, ids=["a rule", "a chain"])
def test_a_rule_of_the_site_before_ours_is_named_with_the_command_that_puts_ours_first(
        net, backend, table, builtin, ours, rule):
    # given rules in force, in front of which the site lets packets pass, by a rule or by a chain of its own
    net.firewall.start_zorp(OLD)
    net.firewall.iptables("-N", "SITE", "-t", table)
    net.firewall.iptables("-A", "SITE", "-t", table, "-p", "tcp", "-m", "comment", "--comment", "ours", "-j", "ACCEPT")
    assert "before our rules" not in net.firewall.setup("check").stdout
    net.firewall.iptables("-I", builtin, "-t", table, *rule)
    rules = saved(net)
    # when it is checked, loaded, or asked about, then each says so
    said = [net.firewall.setup(*command).stdout for command in (["check"], ["status"])]
    said.append(net.firewall.setup("load").stderr)
    for text in said:
        warning, = (line for line in text.splitlines() if "before our rules" in line)
        assert f"table='{table}', rule='-A {builtin} {' '.join(rule)}'" in warning
    # and nothing of the site's is changed
    assert saved(net) == rules
    # and the command that the warning names repairs it, without a moment in which our jump is missing
    assert f" -I {builtin} -j {ours} && " in warning
    net.firewall.run("sh", "-c", warning.partition("repair: ")[2].partition(";")[0])
    assert net.firewall.setup("status").stdout == "in force\n"


def test_kzorpd_names_a_rule_of_the_site_before_ours_once(net, backend):
    # given kzorpd with rules in force
    kzorpd = Kzorpd(net.firewall.directory, net.firewall)
    kzorpd.configure(f"backend: {backend}")
    with contextlib.ExitStack() as stack:
        stack.callback(kzorpd.end)
        kzorpd.start("--drift-check", "1")
        # when the site puts a rule before ours
        net.firewall.iptables("-I", "FORWARD", "-j", "ACCEPT")
        # then that is in the log, as often as it is found to have happened
        said = "warning: a rule of the site lets packets pass before our rules see them"
        kzorpd.log.wait_for("core.error", 2, said)
        for _ in range(2):
            assert kzorpd.command("--reload").returncode == 0
        assert len(kzorpd.log.find("core.error", 2, said)) == 1


def test_a_host_without_any_rule_of_a_policy_forwards_nothing(net, backend):
    for family in (4, 6):
        net.firewall.iptables("-P", "FORWARD", "ACCEPT", family=family)
    net.firewall.start_zorp(policy("Service('web', PlugProxy)"))
    server = net.server.listen(SERVER, 80)
    with pytest.raises(TimeoutError):
        net.client.connect(SERVER, 80, timeout_s=0.3)
    assert server.nobody_came(within_s=0.1)
