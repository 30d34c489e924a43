"""A change of packet rules that kzorpd cannot end, or does not live to end: what the next one makes of it."""

import signal

import pytest

from test.netfilter.test_settled import Stream
from test.support.daemon import DEADLINE_S
from test.support.kzorpd import Kzorpd
from test.support.net import net
from Zorp.transport.kzorpd import KzorpdError

__all__ = ["net"]
pytestmark = pytest.mark.netns

RULE = 'Rule(rule_id={0}, service="fwd", proto=6, dst_port={0})'
NO_SETTLING = """
from Zorp.netfilter import daemon_rules
real = daemon_rules.settle
def settle(*arguments):
    if os.path.exists({flag!r}):
        raise OSError(5, "no such luck")
    return real(*arguments)
daemon_rules.settle = settle
"""
DEATH_BEFORE_THE_RENAME = """
from Zorp.netfilter import backend
real = backend.Backend.apply
def apply(self, plan):
    changed = real(self, plan)
    if os.path.exists({flag!r}):
        os.kill(os.getpid(), 9)
    return changed
backend.Backend.apply = apply
"""


@pytest.fixture
def gateway(net):
    """A kzorpd between client and server, not started; `gateway.flag` is the file that makes its fault happen."""
    made = Kzorpd(net.firewall.directory, net.firewall)
    made.net, made.flag = net, made.directory / "fault"
    made.write_policy(rules=RULE.format(700))
    net.firewall.configure("nft")
    yield made
    made.end()


@pytest.mark.parametrize("mended_by", ["the next check", "the next kzorpd"])
def test_connections_that_cannot_be_decided_about_are_decided_about_later(gateway, mended_by):
    # given a forwarded connection, and a kernel that does not tell its connections
    gateway.fault = NO_SETTLING.format(flag=str(gateway.flag))
    gateway.start("--drift-check", "1")
    stream = Stream(gateway.net, 700)
    assert stream.passes()
    gateway.flag.touch()
    # when its rule goes
    gateway.write_policy(rules=RULE.format(701))
    mark = gateway.log.mark()
    answer = gateway.say(b"RELOAD\n")
    # then the reload does not say that it is done, nor does the status
    assert answer.startswith(b"FAIL forwarded sessions whose rule is gone cannot be ended")
    gateway.log.wait_for("core.error", 1, "Forwarded sessions whose rule is gone cannot be ended", after=mark)
    status = gateway.command("status", program="kzorp-setup")
    assert (status.returncode, status.stdout.splitlines()[-1]) == (
        1, "in force, but not for all connections; load again")
    assert stream.passes()
    # and it is done as soon as the kernel tells
    gateway.flag.unlink()
    if mended_by == "the next kzorpd":
        gateway.stop(signal.SIGKILL)
        gateway.start()
    gateway.log.wait_for("core.info", 3, "Forwarded sessions ended with their rule", after=mark)
    assert not stream.passes()
    assert gateway.command("status", program="kzorp-setup").stdout == "in force\n"


@pytest.mark.parametrize("next_one", ["kzorpd", "kzorp-setup"])
def test_a_kzorpd_that_dies_between_the_kernel_and_its_file_is_followed_by_one_that_knows(gateway, next_one):
    # given a forwarded connection, and a kzorpd that dies when the kernel has new rules and its file has not
    gateway.fault = DEATH_BEFORE_THE_RENAME.format(flag=str(gateway.flag))
    gateway.start()
    stream = Stream(gateway.net, 700)
    assert stream.passes()
    gateway.flag.touch()
    gateway.write_policy(rules=RULE.format(701))
    with pytest.raises(KzorpdError):
        gateway.say(b"RELOAD\n")
    assert gateway.process.wait(DEADLINE_S) == -signal.SIGKILL
    assert any("--dport 701" in rule for rule in gateway.rules())
    # then the status does not say that all is well
    assert gateway.command("status", program="kzorp-setup").returncode == 1
    # when the next one comes
    gateway.flag.unlink()
    if next_one == "kzorpd":
        gateway.start()
    else:
        assert gateway.command("load", program="kzorp-setup").returncode == 0
    # then the rules say what those of the dead one did, if under another number, and nothing lives that they forbid
    assert any("--dport 701" in rule for rule in gateway.rules())
    assert not any("--dport 700" in rule for rule in gateway.rules())
    assert not stream.passes()
    assert gateway.command("status", program="kzorp-setup").stdout == "in force\n"
    assert Stream(gateway.net, 701).passes()
