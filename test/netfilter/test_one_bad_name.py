"""One bad item of many, for kzorpd: a name whose server lies, and steps that fail by a defect of ours.

Whatever it is, the other names are followed, and who asked for something hears what became of it.
"""

import pytest

from test.support.kzorpd import RULES, ZONES, kzorpd

__all__ = ["kzorpd"]

PARTNERS = "zorp.4.partners"
NAMED = ZONES + '\nZone("partners", hostnames=("a.test",))'
WITH_BAD = NAMED + '\nZone("bad", hostnames=("bad.test",))'
RULES_BY_NAME = RULES + '\nRule(rule_id=2, service="web", proto=6, dst_port=80, src_zone="partners")'
LIE = {"A": "192.0.2.9", "AAAA": "::ffff:192.0.2.9"}
OF_ONE_NAME = """
from Zorp.ResolverCache import ResolverCache
whole = ResolverCache.updateHost
def fails_for_one(self, host):
    if host == "bad.test":
        raise KeyError("a defect")
    return whole(self, host)
ResolverCache.updateHost = fails_for_one
"""
OF_A_STEP = """
from Zorp.netfilter import daemon_names, daemon_rules
place = {place}
whole, calls = place.{name}, []
def fails(self, *arguments, **options):
    calls.append(1)
    if len(calls) in {when}:
        raise KeyError("a defect")
    return whole(self, *arguments, **options)
place.{name} = fails
"""


@pytest.fixture
def named(kzorpd):
    """kzorpd with a name that is followed and a name that is not as others are, not started."""
    kzorpd.write_policy(WITH_BAD, RULES_BY_NAME)
    kzorpd.dns = kzorpd.name_server()
    kzorpd.dns.set("a.test", "A", "192.0.2.1", ttl=1)
    kzorpd.dns.set("bad.test", "A", "192.0.2.9", ttl=1)
    return kzorpd


def assert_followed(named):
    """The other name is looked up, again and again."""
    for address in ("192.0.2.2", "192.0.2.3"):
        named.dns.set("a.test", "A", address, ttl=1)
        named.wait_for_members(PARTNERS, address)


def test_a_name_server_that_gives_an_address_twice_stops_no_other_name_and_no_reload(named):
    # given a name server that answers with one address, plain and in the form of IPv6
    for kind, address in LIE.items():
        named.dns.set("bad.test", kind, address, ttl=1)
    named.start()
    named.log.wait_for("core.error", 3, "Address in an answer refused", host="bad.test", address=LIE["AAAA"])
    # then the other name is followed, the lie notwithstanding
    assert_followed(named)
    # and the name that lies can be taken out of the policy
    named.write_policy(NAMED, RULES_BY_NAME)
    reloaded = named.command("--reload")
    assert (reloaded.returncode, reloaded.stderr) == (0, "")
    assert "Unexpected error" not in named.log.text()


def test_a_defect_that_one_name_meets_is_said_once_and_stops_no_other_name(named):
    # given a defect of ours in the look-up of one name
    named.fault = OF_ONE_NAME
    named.start()
    # then the other name is followed
    assert_followed(named)
    # and the defect is told, once, though the name was tried again each second
    assert len(named.log.find("core.error", 1, "Unexpected error, host name keeps its addresses")) == 1


@pytest.mark.parametrize(("place", "name"), [
    ("daemon_rules.PacketRules", "take_policies"), ("daemon_rules.PacketRules", "look_for_drift"),
    ("daemon_names.HostNames", "watch")])
def test_a_reload_that_fails_by_a_defect_is_answered(named, place, name):
    # given a defect of ours that the next steps of this kind meet
    calls_before = {"take_policies": 1, "look_for_drift": 0, "watch": 2}[name]
    named.fault = OF_A_STEP.format(place=place, name=name, when=(calls_before + 1,))
    named.arguments += ["--drift-check", "3600"]
    named.start()
    # when somebody asks for a reload, then he hears of it
    reloaded = named.command("--reload")
    assert reloaded.returncode == 1
    assert "unexpected error, the log says more: KeyError" in reloaded.stderr
    # and the next one succeeds, and names are followed
    assert named.command("--reload").returncode == 0
    assert_followed(named)


@pytest.mark.parametrize(("place", "name", "call"), [
    ("daemon_rules.PacketRules", "take_policies", 1), ("daemon_names.HostNames", "watch", 2)])
def test_a_start_that_meets_a_defect_comes_to_its_end(named, place, name, call):
    # given a defect of ours when policies have been read: it starts all the same, and serves
    named.fault = OF_A_STEP.format(place=place, name=name, when=(call,))
    named.start()
    assert named.command("--reload").returncode == 0
    assert_followed(named)


def test_addresses_that_a_defect_kept_out_are_taken_with_the_next_change(named):
    # given addresses that were not taken, which is tried again in a minute
    named.fault = OF_A_STEP.format(place="daemon_rules.PacketRules", name="take_addresses", when=(1,))
    named.start()
    named.log.wait_for("core.error", 1, "Unable to update addresses in zones, keep existing ones")
    named.log.wait_for("core.error", 1, "Unexpected error")
    # when a name changes before that, then it is taken at once
    assert_followed(named)
