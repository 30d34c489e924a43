"""Entries of connection tracking that no packet of a test made: other protocols, zones, refusals of the kernel."""

from __future__ import annotations

import errno

import pytest
from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

from test.support.net import net
from Zorp.netfilter import sessions
from Zorp.netfilter.daemon_rules import PacketRules
from Zorp.netfilter.evaluator import Evaluator
from Zorp.netfilter.sessions import settle
from Zorp.netfilter.site import Site
from Zorp.rules.description import ForwardData, InstanceDescription
from Zorp.rules.engine import RuleData

__all__ = ["net"]
pytestmark = pytest.mark.netns
MARKS = Site().marks
FORWARDED = MARKS.forward | MARKS.of_index(1)


def add(mark: int, protocol: int, sport: int | None = 100, **more) -> None:
    """Put a connection into connection tracking."""
    original = NFCTAttrTuple(saddr="10.1.0.2", daddr="10.2.0.2", proto=protocol, sport=sport,
                             dport=None if sport is None else 200)
    with NFCTSocket() as tracking:
        tracking.entry("add", timeout=300, tuple_orig=original, tuple_reply=original.reverse(), mark=mark, **more)


def tracked() -> list[tuple[int, int | None, int]]:
    """Return (protocol, zone, mark) of all connections."""
    with NFCTSocket() as tracking:
        return sorted((entry.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_NUM"),
                       entry.get_attr("CTA_ZONE") or 0, entry.get_attr("CTA_MARK")) for entry in tracking.dump())


@pytest.mark.parametrize(("protocol", "more"), [
    (17, {}), (17, {"zone": 5}), (33, {}), (47, {}), (50, {"sport": None}), (132, {}), (136, {})],
    ids=["UDP", "another zone", "DCCP", "GRE", "ESP", "SCTP", "UDP-Lite"])
def test_a_forwarded_connection_of_any_protocol_ends_with_its_rule(net, protocol, more):
    def story():
        add(FORWARDED, protocol, **more)
        assert [found[0] for found in tracked()] == [protocol]
        assert settle(Site(), (), (), (), Evaluator(())).ended == 1
        assert tracked() == []

    net.firewall.inside(story)


class Busy:
    """A socket to a kernel that does not give up what a network card carries."""

    def __init__(self, stubborn: str) -> None:
        self.stubborn, self.deleted = stubborn, []

    def entry(self, command: str, *, tuple_orig: NFCTAttrTuple) -> None:
        assert command == "del"
        if tuple_orig.saddr == self.stubborn:
            raise NetlinkError(errno.EBUSY, "Device or resource busy")
        if tuple_orig.saddr == "10.1.0.9":
            raise NetlinkError(errno.ENOENT, "No such file or directory")
        self.deleted.append(tuple_orig.saddr)


@pytest.mark.parametrize("stubborn", ["10.1.0.1", "10.1.0.3"])
def test_a_connection_that_the_kernel_does_not_give_up_is_an_error_and_keeps_no_other_one(monkeypatch, stubborn):
    # given three connections without a rule, one of which the kernel keeps, and one that ends by itself meanwhile
    kernel = Busy(stubborn)
    entries = [sessions._Entry(kernel, NFCTAttrTuple(saddr=source, daddr="10.2.0.2", proto=6, sport=1, dport=2),
                               FORWARDED, None) for source in ("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.9")]
    monkeypatch.setattr(sessions, "_entries", lambda site, is_wanted, **pattern: [
        entry for entry in entries if is_wanted(entry.mark) and "status" not in pattern])
    # when they are decided about, then that is not done
    with pytest.raises(NetlinkError, match="busy"):
        settle(Site(), (), (), (), Evaluator(()))
    # but the others are ended
    assert kernel.deleted == [source for source in ("10.1.0.1", "10.1.0.2", "10.1.0.3") if source != stubborn]


@pytest.mark.parametrize("keep_sessions", [False, True])
def test_the_look_for_drift_lets_connections_begin_anew_that_were_too_late_for_their_rule(net, tmp_path, keep_sessions):
    def story():
        # given rules in force, under which all connections were decided about
        rules = PacketRules(Site(backend="nft", state_dir=str(tmp_path), families=(4,), keep_sessions=keep_sessions))
        rules.hand_over(InstanceDescription(instance="i", services=(ForwardData(name="fwd"),),
                                            rules=(RuleData(rule_id=1, service="fwd"),)))
        assert rules.look_for_drift() is None
        # and connections that came to a forwarding rule too late for its NAT, and one that did not
        add(MARKS.undecided, 17)
        add(MARKS.undecided, 132)
        add(FORWARDED, 17, sport=101)
        # when kzorpd compares the kernel with what it was given, as it does all the time
        assert rules.look_for_drift() is None
        # then their next packets begin them anew
        assert tracked() == [(17, 0, FORWARDED)]

    net.firewall.inside(story)
