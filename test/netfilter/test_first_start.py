"""A host on which nothing has run yet, taken into service in the order that README.md gives."""

import sys

import pytest

from test.support.daemon import ROOT, wait_until
from test.support.kzorpd import Kzorpd
from test.support.leaks import Capture, connected
from test.support.net import SERVER, SERVER6, net, policy

__all__ = ["net"]
pytestmark = pytest.mark.netns

RULES = policy("""
    Service("web", PlugProxy)
    Rule(proto=6, dst_port=80, service="web")
    """, zones='Zone("all", ["0.0.0.0/0", "::/0"])')
SERVERS = [(SERVER, 80), (SERVER6, 80)]
NEVER_RAN = "instance 'intra' has never run: packets for its proxies are dropped until it starts"


@pytest.fixture
def fresh(net):
    """A host with a policy that fixes no port, and servers behind it."""
    for address, port in SERVERS:
        net.server.listen(address, port).answer_all(b"hello")
    net.daemon = net.firewall.add_zorp(RULES)
    return net


def test_the_readme_has_this_order():
    text = (ROOT / "README.md").read_text()
    check, enable = text.index("    kzorp-setup check "), text.index("    systemctl enable --now kzorp-setup kzorpd ")
    assert check < enable


@pytest.mark.parametrize("backend", ["nft", "legacy-restore"])
def test_rules_are_checked_and_loaded_before_the_first_start_and_are_closed_until_it(fresh, backend):
    firewall = fresh.firewall
    firewall.backend = backend
    with Capture(fresh.server) as capture:
        # given a host whose instance has never run, when its packet rules are checked and printed
        checked = firewall.setup("check")
        # then it is said what the rules lack, and the rest of the host was looked at
        assert NEVER_RAN in checked.stdout
        assert "rule_listen_port" in checked.stdout
        assert f"back end: {backend}" in checked.stdout
        assert "TPROXY" not in firewall.setup("print").stdout
        # when they are put in force as at boot, then that is no failure, in one line
        boot = firewall.setup("boot")
        assert (boot.returncode, boot.stderr.count(NEVER_RAN)) == (0, 1)
        assert firewall.setup("status").stdout == "in force\n"
        # and nobody gets around the proxy
        assert connected(fresh.client, SERVERS, within_s=0.3) == []
        assert capture.arrived(80) == []
    # when kzorpd runs and the instance starts for the first time
    kzorpd = Kzorpd(firewall.directory, firewall)
    firewall.write_settings()
    kzorpd.start()
    fresh.daemon.start()
    assert kzorpd.say(b"RELOAD\n") == b"OK"
    # then it serves
    wait_until(lambda: connected(fresh.client, SERVERS, within_s=1) == SERVERS, "the proxies serve")
    kzorpd.end()


def test_check_tells_what_the_host_lacks_whatever_becomes_of_the_policies(fresh):
    # given a policy that cannot be loaded, on a host that drops packets on asymmetric routes
    fresh.firewall.sysctl("net.ipv4.conf.fc.rp_filter", "1")
    fresh.daemon.write_policy(RULES + "    Rule(service='nobody')\n")
    checked = fresh.firewall.setup("check", check=False)
    # then both is said
    assert checked.returncode == 1
    assert "error: instance 'intra': " in checked.stdout
    assert "strict interfaces: fc" in checked.stdout
    # and so it is without any instances.conf
    (fresh.firewall.directory / "instances.conf").unlink()
    checked = fresh.firewall.run(sys.executable, str(ROOT / "sbin" / "kzorp-setup"), "--config-dir",
                                 str(fresh.firewall.directory), "check", check=False)
    assert checked.returncode == 1
    assert "instances.conf: No such file" in checked.stdout
    assert "strict interfaces: fc" in checked.stdout


def test_status_says_what_the_kernel_holds_where_no_instance_is(net):
    # given instances.conf as it is delivered: nobody is in there
    assert net.firewall.setup("status", check=False).stdout == "not loaded\n"
    loaded = net.firewall.setup("load")
    # when that is in force, then the status says so, and also after another load
    assert "loaded; instances: 0" in loaded.stdout
    assert "there is no instance" in net.firewall.setup("check").stdout
    assert net.firewall.setup("status").stdout == "in force\n"
    net.firewall.setup("load")
    assert net.firewall.setup("status").stdout == "in force\n"
    # and when it is gone, too
    net.firewall.setup("unload")
    assert net.firewall.setup("status", check=False).stdout == "not loaded\n"


@pytest.mark.parametrize("settings", ["", "keep_sessions: true\n"])
def test_a_host_that_boot_could_only_close_is_not_said_to_have_its_rules(fresh, settings):
    fresh.firewall.more_settings = settings
    fresh.daemon.write_policy(RULES + "    Rule(service='nobody')\n")
    assert fresh.firewall.setup("boot", check=False).returncode == 1
    status = fresh.firewall.setup("status", check=False)
    assert (status.returncode, status.stdout) == (1, "closed: nothing is forwarded until packet rules are loaded\n")
