"""NAT classes and policies: what is translated to what, what is remembered, what servers see."""

from __future__ import annotations

import ipaddress
import random
import threading
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.support.chaining import address_of, asking
from test.support.gateway import Server
from test.support.logged import captured_log
from Zorp import Globals
from Zorp.Constants import AF_INET, AF_INET6, FALSE, TRUE, Z_PORT_EXACT
from Zorp.Exceptions import DACException, PolicyError, UserException
from Zorp.NAT import (
    NAT46,
    NAT64,
    NAT_DNAT,
    NAT_SNAT,
    AbstractNAT,
    ForgeClientSourceNAT,
    GeneralNAT,
    HashNAT,
    NATPolicy,
    OneToOneMultiNAT,
    OneToOneNAT,
    RandomNAT,
    StaticNAT,
    getNATPolicy,
)
from Zorp.Router import DirectedRouter, TransparentRouter
from Zorp.SockAddr import SockAddrInet, SockAddrInet6, SockAddrUnix, from_ip_int
from Zorp.Subnet import Inet6Subnet, InetDomain, InetSubnet

__all__ = ["asking"]

V4, V6 = SockAddrInet, SockAddrInet6
SESSION = types.SimpleNamespace(session_id="svc/test:0", client_address=V4("10.0.0.7", 4000))


@pytest.fixture(autouse=True)
def no_policies(monkeypatch):
    monkeypatch.setattr(Globals, "nat_policies", {})


@pytest.fixture
def server():
    with Server() as running:
        yield running


def translated(nat, source, destination, nat_type):
    """Return the text of the answer, None for none."""
    result = nat.performTranslation(SESSION, (source, destination), nat_type)
    return result and str(result)


# GeneralNAT

def test_three_element_rule_moves_the_source_in_snat_and_the_destination_in_dnat():
    nat = GeneralNAT([(InetSubnet("192.168.1.0/24"), InetSubnet("198.51.100.0/24"), InetSubnet("10.0.0.0/24"))])
    addrs = (V4("192.168.1.7", 1234), V4("198.51.100.9", 80))
    assert translated(nat, *addrs, NAT_SNAT) == "AF_INET(10.0.0.7:1234)"
    assert translated(nat, *addrs, NAT_DNAT) == "AF_INET(10.0.0.9:80)"
    # and neither for another source or destination
    assert translated(nat, V4("192.168.2.7", 1), addrs[1], NAT_SNAT) is None
    assert translated(nat, addrs[0], V4("198.51.101.9", 1), NAT_SNAT) is None


def test_source_that_is_not_known_matches():
    nat = GeneralNAT([(InetSubnet("0.0.0.0/32"), InetSubnet("10.0.0.0/8"), InetSubnet("20.0.0.0/8"))])
    assert translated(nat, None, V4("10.1.2.3", 80), NAT_DNAT) == "AF_INET(20.1.2.3:80)"
    assert translated(nat, V4("10.0.0.5", 1), V4("10.1.2.3", 80), NAT_DNAT) is None
    assert translated(nat, None, V4("10.1.2.3", 80), NAT_SNAT) is None


def test_two_element_rule_is_for_one_side_each():
    nat = GeneralNAT([(InetDomain("10.0.0.0/8"), InetDomain("20.0.0.0/8"))])
    assert translated(nat, None, V4("10.0.0.1", 8888), NAT_DNAT) == "AF_INET(20.0.0.1:8888)"
    assert translated(nat, V4("10.0.0.1", 5), V4("192.0.2.1", 80), NAT_SNAT) == "AF_INET(20.0.0.1:5)"
    assert translated(nat, V4("192.0.2.1", 5), V4("10.0.0.1", 80), NAT_SNAT) is None


def test_first_match_wins_and_both_kinds_may_be_mixed():
    anywhere = InetSubnet("0.0.0.0/0")
    nat = GeneralNAT([
        (InetSubnet("10.1.0.0/16"), InetSubnet("172.16.0.0/16")),
        (InetSubnet("10.0.0.0/8"), anywhere, InetSubnet("172.17.0.0/16")),
    ])
    assert translated(nat, V4("10.1.2.3", 0), V4("192.0.2.1", 80), NAT_SNAT) == "AF_INET(172.16.2.3:0)"
    assert translated(nat, V4("10.2.2.3", 0), V4("192.0.2.1", 80), NAT_SNAT) == "AF_INET(172.17.2.3:0)"


def test_host_bits_are_cut_or_filled_with_zeros():
    smaller = GeneralNAT([(InetSubnet("11.0.0.0/8"), InetSubnet("192.168.0.0/24"))])
    assert translated(smaller, V4("11.255.255.255", 0), None, NAT_SNAT) == "AF_INET(192.168.0.255:0)"
    larger = GeneralNAT([(InetSubnet("192.168.1.0/24"), InetSubnet("10.0.0.0/8"))])
    assert translated(larger, V4("192.168.1.7", 0), None, NAT_SNAT) == "AF_INET(10.0.0.7:0)"


def test_ipv6_rule_and_the_other_family():
    nat = GeneralNAT([(Inet6Subnet("2001:db8:1::/48"), Inet6Subnet("::/0"), Inet6Subnet("2001:db8:2::/64"))])
    assert translated(nat, V6("2001:db8:1::7", 1), V6("2001:db8::1", 80), NAT_SNAT) == "AF_INET6(2001:db8:2::7:1)"
    assert translated(nat, V4("10.0.0.1", 1), V4("10.0.0.2", 80), NAT_SNAT) is None
    assert translated(nat, SockAddrUnix("/a"), SockAddrUnix("/b"), NAT_DNAT) is None


@pytest.mark.parametrize("mapping", [
    (InetSubnet("10.0.0.0/8"), InetSubnet("0.0.0.0/0"), InetSubnet("20.0.0.0/8")),     # the comma is missing
    [(InetSubnet("10.0.0.0/8"), InetSubnet("0.0.0.0/0"), InetSubnet("20.0.0.0/8"))],
    ((InetSubnet("10.0.0.0/8"), InetSubnet("20.0.0.0/8")),),
])
def test_forms_of_one_rule(mapping):
    assert translated(GeneralNAT(mapping), V4("10.0.0.1", 0), V4("192.0.2.1", 1), NAT_SNAT) == "AF_INET(20.0.0.1:0)"


@pytest.mark.parametrize("mapping", [
    None, [1], [(InetSubnet("10.0.0.0/8"),)], ["10.0.0.0/8"], [("10.0.0.0/8", "20.0.0.0/8")],
    [(InetSubnet("10.0.0.0/8"), Inet6Subnet("::/0"))],
])
def test_rules_that_are_none_are_refused_at_load(mapping):
    with pytest.raises(PolicyError, match="Invalid mapping of GeneralNAT"):
        GeneralNAT(mapping)


def test_mapping_for_the_packet_filter():
    rule = (InetSubnet("10.0.0.0/8"), InetSubnet("0.0.0.0/0"), InetSubnet("20.0.0.0/8"))
    assert NATPolicy("a", GeneralNAT([rule])).getKZorpMapping() == [rule]
    with pytest.raises(ValueError, match="GeneralNAT with old-style mapping parameter does not support KZorp"):
        GeneralNAT([rule[:2]]).getKZorpMapping()
    with pytest.raises(ValueError, match="NAT class does not support KZorp representation"):
        NATPolicy("b", StaticNAT(V4("10.0.0.1", 80))).getKZorpMapping()


# the other classes

def test_static_nat_gives_copies_with_its_port():
    nat = StaticNAT(V4("10.0.0.1", 8080))
    nat.performTranslation(SESSION, (None, V4("192.0.2.1", 80)), NAT_DNAT).port = 1
    assert translated(nat, None, V4("192.0.2.1", 80), NAT_DNAT) == "AF_INET(10.0.0.1:8080)"


def test_random_nat_gives_copies_of_its_addresses():
    addresses = [V4(f"10.0.0.{n}", n) for n in (1, 2, 3)]
    nat = RandomNAT(addresses)
    answers = [nat.performTranslation(SESSION, (V4("10.9.9.9", 5), None), NAT_SNAT) for _ in range(100)]
    assert {str(answer) for answer in answers} == {str(address) for address in addresses}
    answers[0].port = 99
    assert 99 not in [address.port for address in addresses]


def test_forge_client_source_nat():
    assert translated(ForgeClientSourceNAT(), None, V4("192.0.2.1", 80), NAT_SNAT) == "AF_INET(10.0.0.7:0)"


@pytest.mark.parametrize("nat", [
    OneToOneNAT(InetSubnet("10.0.0.0/24"), InetSubnet("20.0.0.0/24")),
    OneToOneMultiNAT([(InetSubnet("30.0.0.0/24"), InetSubnet("40.0.0.0/24")),
                      (InetSubnet("10.0.0.0/24"), InetSubnet("20.0.0.0/24"))]),
    HashNAT({"10.0.0.7": "20.0.0.7"}),
], ids=lambda nat: type(nat).__name__)
def test_classes_with_default_reject(nat):
    inside, outside = V4("10.0.0.7", 80), V4("10.0.1.7", 80)
    # SNAT leaves the port to the kernel, DNAT keeps it
    assert translated(nat, inside, None, NAT_SNAT) == "AF_INET(20.0.0.7:0)"
    assert translated(nat, None, inside, NAT_DNAT) == "AF_INET(20.0.0.7:80)"
    # outside is refused
    for nat_type, addrs in ((NAT_SNAT, (outside, None)), (NAT_DNAT, (None, outside))):
        with pytest.raises(DACException, match=r"IP not within the required range\."):
            nat.performTranslation(SESSION, addrs, nat_type)
    # unless the policy says otherwise: then it stays, and a NATPolicy says "not translated"
    nat.default_reject = FALSE
    try:
        assert nat.performTranslation(SESSION, (None, outside), NAT_DNAT) is outside
        assert NATPolicy("p", nat).performTranslation(SESSION, (outside, None), NAT_SNAT) is None
    finally:
        nat.default_reject = TRUE


def test_one_to_one_nat_for_ipv6_and_with_host_bits():
    nat = OneToOneNAT(Inet6Subnet("2001:db8:1::/64"), Inet6Subnet("2001:db8:2::/64"))
    assert translated(nat, V6("2001:db8:1::7", 9), None, NAT_SNAT) == "AF_INET6(2001:db8:2::7:0)"
    nat = OneToOneNAT(InetSubnet("10.0.0.9/24"), InetSubnet("20.0.0.9/24"))
    assert translated(nat, V4("10.0.0.7", 9), None, NAT_SNAT) == "AF_INET(20.0.0.7:0)"


def test_sizes_that_differ_are_refused_at_load():
    with pytest.raises(ValueError, match="OneToOneNAT requires two domains of the same size"):
        OneToOneNAT(InetSubnet("10.0.0.0/24"), InetSubnet("20.0.0.0/25"))
    with pytest.raises(ValueError, match="OneToOneMultiNAT requires two domains of the same size"):
        OneToOneMultiNAT([(InetSubnet("10.0.0.0/24"), Inet6Subnet("::/24"))])
    with pytest.raises(PolicyError, match="Invalid mapping of OneToOneMultiNAT"):
        OneToOneMultiNAT([InetSubnet("10.0.0.0/24")])


@pytest.mark.parametrize("make", [
    lambda: StaticNAT("10.0.0.1"), lambda: RandomNAT([]), lambda: RandomNAT(["10.0.0.1"]), lambda: RandomNAT(5),
    lambda: HashNAT({"10.0.0.1": "nonsense"}), lambda: HashNAT({1: "10.0.0.1"}), lambda: HashNAT({"10.0.0.256": "::1"}),
])
def test_wrong_arguments_are_refused_at_load(make):
    with pytest.raises(PolicyError):
        make()


def test_hash_nat_with_ipv6():
    nat = HashNAT({"2001:db8::1": "2001:db8::2"})
    assert translated(nat, None, V6("2001:0db8:0::1", 25), NAT_DNAT) == "AF_INET6(2001:db8::2:25)"


def test_abstract_nat():
    with pytest.raises(NotImplementedError):
        AbstractNAT().performTranslation(SESSION, (None, None), NAT_SNAT)


# RFC 6052

EMBEDDED = {          # RFC 6052, 2.4
    32: "2001:db8:c000:221::", 40: "2001:db8:1c0:2:21::", 48: "2001:db8:122:c000:2:2100::",
    56: "2001:db8:122:3c0:0:221::", 64: "2001:db8:122:344:c0:2:2100::", 96: "2001:db8:122:344::192.0.2.33",
}
PREFIXES = {32: "2001:db8::", 40: "2001:db8:100::", 48: "2001:db8:122::", 56: "2001:db8:122:300::",
            64: "2001:db8:122:344::", 96: "2001:db8:122:344::"}


@pytest.mark.parametrize(("mask", "text"), EMBEDDED.items())
def test_vectors_of_the_rfc(mask, text):
    there = NAT46(PREFIXES[mask], mask)
    back = NAT64(mask)
    embedded = there.performTranslation(SESSION, (None, V4("192.0.2.33", 80)), NAT_DNAT)
    assert ipaddress.ip_address(embedded.ip_s) == ipaddress.ip_address(text)
    assert embedded.port == 80
    assert translated(back, None, V6(text, 81), NAT_DNAT) == "AF_INET(192.0.2.33:81)"


def test_default_prefix():
    assert translated(NAT46(), None, V4("192.0.2.33", 80), NAT_DNAT) == "AF_INET6(64:ff9b::c000:221:80)"


@given(st.sampled_from(sorted(EMBEDDED)), st.ip_addresses(v=4), st.ip_addresses(v=6), st.ip_addresses(v=6),
       st.integers(0, 65535))
def test_there_and_back(mask, address, prefix, suffix, port):
    tail = {32: 7, 40: 6, 48: 5, 56: 4, 64: 3, 96: 0}[mask]
    suffix_text = str(ipaddress.IPv6Address(bytes(16 - tail) + suffix.packed[16 - tail:]))
    there = NAT46(str(prefix), mask, suffix_text)
    embedded = there.performTranslation(SESSION, (from_ip_int(AF_INET, int(address), port), None), NAT_SNAT)
    octets = embedded.pack()
    assert octets[:mask // 8] == prefix.packed[:mask // 8]
    assert octets[16 - tail:] == suffix.packed[16 - tail:]
    assert mask == 96 or octets[8] == 0
    assert translated(NAT64(mask), embedded, None, NAT_SNAT) == f"AF_INET({address}:{port})"


def test_errors_of_nat64_and_nat46():
    with pytest.raises(UserException, match=r"Prefix mask must be one of: \(32, 40, 48, 56, 64, 96\); mask='33'"):
        NAT64(33)
    with pytest.raises(UserException, match=r"Prefix mask must be one of: .*; mask='0'"):
        NAT46(prefix_mask=0)
    with pytest.raises(UserException, match=r"Invalid prefix string specified; error='.*'"):
        NAT46("nonsense")
    with pytest.raises(UserException, match=r"Invalid suffix string specified; error='.*'"):
        NAT46(suffix="1.2.3.4")
    with pytest.raises(UserException, match="the first 4 bytes should be zeroes"):
        NAT46(suffix="::1")
    with pytest.raises(UserException, match="the first 12 bytes should be zeroes"):
        NAT46("2001:db8::", 32, "0:0:0:1::")
    with pytest.raises(UserException, match="NAT64 might only be used to translate IPv6 addresses; family='2'"):
        NAT64().performTranslation(SESSION, (None, V4("10.0.0.1", 1)), NAT_DNAT)
    with pytest.raises(UserException, match="NAT46 might only be used to translate IPv4 addresses; family='10'"):
        NAT46().performTranslation(SESSION, (None, V6("::1", 1)), NAT_DNAT)


def test_longest_suffix():
    assert translated(NAT46("2001:db8::", 32, "::ff:1:2:3"), V4("192.0.2.33", 1), None, NAT_SNAT) == (
        "AF_INET6(2001:db8:c000:221:ff:1:2:3:1)")


# NATPolicy

def test_policy_registers_and_names_are_unique():
    policy = NATPolicy("hide", StaticNAT(V4("10.0.0.1", 80)))
    assert getNATPolicy("hide") is policy
    assert (policy.name, policy.cacheable, policy.nat_cache.name) == ("hide", TRUE, "nat(hide)")
    with pytest.raises(ValueError, match="Duplicate NATPolicy name: hide"):
        NATPolicy("hide", StaticNAT(V4("10.0.0.1", 80)))
    with pytest.raises(PolicyError, match="Invalid NAT object"):
        NATPolicy("class", StaticNAT)


def test_unknown_policy():
    with captured_log() as log:
        assert getNATPolicy(None) is None
        assert getNATPolicy("") is None
        assert log.messages == []
        assert getNATPolicy("nosuch") is None
        assert log.has("No such NAT policy; policy='%s'", ("nosuch",))


def test_log_lines():
    policy = NATPolicy("p", StaticNAT(V4("10.0.0.1", 8080)))
    with captured_log() as log:
        policy.performTranslation(SESSION, (None, V4("192.0.2.1", 80)), NAT_DNAT)
    assert [(m.session, m.tag, m.level, m.text) for m in log.messages] == [
        ("svc/test:0", "core.debug", 4,
         "Before NAT mapping; nat_type='1', src_addr='None', dst_addr='AF_INET(192.0.2.1:80)'"),
        ("svc/test:0", "core.debug", 4,
         "After NAT mapping; nat_type='1', src_addr='None', dst_addr='AF_INET(192.0.2.1:80)',"
         " new_addr='AF_INET(10.0.0.1:8080)'"),
    ]


class Counting(AbstractNAT):
    """Gives an answer of its own each time."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def performTranslation(self, session, addrs, nat_type):
        return self.answers.pop(0)


def test_answers_are_remembered_by_both_addresses_and_the_kind():
    policy = NATPolicy("p", Counting(V4("10.0.0.1", 0), V4("10.0.0.2", 0), V4("10.0.0.3", 80), None))
    source, server = V4("192.0.2.7", 0), V4("198.51.100.1", 80)
    for _ in range(2):
        assert policy.performTranslation(SESSION, (source, server), NAT_SNAT).ip_s == "10.0.0.1"
        assert policy.performTranslation(SESSION, (V4("192.0.2.8", 0), server), NAT_SNAT).ip_s == "10.0.0.2"
        assert policy.performTranslation(SESSION, (source, server), NAT_DNAT).ip_s == "10.0.0.3"
        # "not translated" is an answer too
        assert policy.performTranslation(SESSION, (V4("192.0.2.9", 0), server), NAT_SNAT) is None
    assert policy.nat.answers == []


def test_remembered_answers_are_copies():
    policy = NATPolicy("p", Counting(V4("10.0.0.1", 0)))
    addrs = (V4("192.0.2.7", 0), None)
    first = policy.performTranslation(SESSION, addrs, NAT_SNAT)
    first.port = 99
    first.ip_s = "9.9.9.9"
    assert str(policy.performTranslation(SESSION, addrs, NAT_SNAT)) == "AF_INET(10.0.0.1:0)"


def test_port_of_the_question_is_kept_where_the_translation_keeps_it():
    policy = NATPolicy("p", GeneralNAT([(InetSubnet("10.0.0.0/8"), InetSubnet("20.0.0.0/8"))]))
    for port in (80, 443, 0):
        result = policy.performTranslation(SESSION, (None, V4("10.0.0.1", port)), NAT_DNAT)
        assert str(result) == f"AF_INET(20.0.0.1:{port})"


def test_port_of_the_translation_is_kept_where_it_has_its_own():
    policy = NATPolicy("p", OneToOneNAT(InetSubnet("10.0.0.0/8"), InetSubnet("20.0.0.0/8")))
    assert policy.performTranslation(SESSION, (V4("10.0.0.1", 0), None), NAT_SNAT).port == 0
    assert policy.performTranslation(SESSION, (V4("10.0.0.1", 4000), None), NAT_SNAT).port == 0


@pytest.mark.parametrize(("answer_port", "second"), [(80, 443), (8080, 8080)])
def test_class_of_the_site_is_judged_by_its_first_answer(answer_port, second):
    policy = NATPolicy("p", Counting(V4("10.0.0.1", answer_port)))
    policy.performTranslation(SESSION, (None, V4("192.0.2.1", 80)), NAT_DNAT)
    assert policy.performTranslation(SESSION, (None, V4("192.0.2.1", 443)), NAT_DNAT).port == second


def test_without_cache_each_question_is_asked():
    policy = NATPolicy("p", Counting(V4("10.0.0.1", 1), V4("10.0.0.2", 2)), cacheable=FALSE)
    addrs = (V4("192.0.2.7", 0), V4("198.51.100.1", 80))
    assert [str(policy.performTranslation(SESSION, addrs, NAT_SNAT)) for _ in range(2)] == [
        "AF_INET(10.0.0.1:1)", "AF_INET(10.0.0.2:2)"]


def test_refusals_are_not_remembered_as_answers():
    policy = NATPolicy("p", HashNAT({"10.0.0.1": "20.0.0.1"}))
    for _ in range(2):
        with pytest.raises(DACException):
            policy.performTranslation(SESSION, (None, V4("10.0.0.2", 80)), NAT_DNAT)


def test_no_address_at_all():
    with pytest.raises(ValueError, match="NAT without any address set"):
        NATPolicy("p", StaticNAT(V4("10.0.0.1", 1))).performTranslation(SESSION, (None, None), NAT_SNAT)


def test_sessions_that_ask_at_the_same_time_get_the_same_answer():
    # given a translation that every session computes differently, and all at once
    together = threading.Barrier(8)

    class Slow(AbstractNAT):
        def performTranslation(self, session, addrs, nat_type):
            together.wait(10)
            return V4(f"10.0.0.{random.randint(1, 250)}", 0)

    policy = NATPolicy("p", Slow())
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(str(policy.performTranslation(
        SESSION, (V4("192.0.2.7", 0), None), NAT_SNAT)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    # then one of them was the decision, and everybody got that
    assert len(answers) == 8
    assert len(set(answers)) == 1


def test_families_are_kept_apart_in_the_memory():
    policy = NATPolicy("p", Counting(V4("10.0.0.1", 0), V4("10.0.0.2", 0)))
    assert policy.performTranslation(SESSION, (from_ip_int(AF_INET, 7, 0), None), NAT_SNAT).ip_s == "10.0.0.1"
    assert policy.performTranslation(SESSION, (from_ip_int(AF_INET6, 7, 0), None), NAT_SNAT).ip_s == "10.0.0.2"


# at the server

def test_server_sees_the_translated_source_and_others_the_firewall(asking, server):
    """Scenario 26."""
    # given clients of one net that appear to one server as another net
    nat = GeneralNAT([(InetSubnet("127.0.1.0/24"), InetSubnet("127.0.0.1/32"), InetSubnet("127.0.2.0/24"))])
    snat = NATPolicy("snat", nat)
    client = V4("127.0.1.7", 20000)
    # when a client connects to it
    assert asking(client=client, wanted=address_of(server), snat_policy=snat).connect() is not None
    # then it sees the translated address
    assert server.wait_for_peers(1)[0][0] == "127.0.2.7"
    # and another server sees the firewall's own address
    with Server(host="127.0.0.3") as other:
        assert asking(client=client, wanted=address_of(other), snat_policy=snat).connect() is not None
        assert other.wait_for_peers(1)[0][0] in ("127.0.0.1", "127.0.0.3")


def test_source_that_snat_does_not_know_is_forged_only_where_the_router_says_so(asking, server):
    """With forge_addr the client's address stays; without, also a wish for its port is dropped."""
    snat = NATPolicy("snat", GeneralNAT([(InetSubnet("10.0.0.0/8"), InetSubnet("127.0.2.0/24"))]))
    forging = TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_EXACT)
    assert asking(forging, wanted=address_of(server), snat_policy=snat).connect() is not None
    assert server.wait_for_peers(1)[0] == ("127.0.0.5", 20000)
    plain = TransparentRouter(forge_port=Z_PORT_EXACT)
    assert asking(plain, wanted=address_of(server), snat_policy=snat).connect() is not None
    host, port = server.wait_for_peers(2)[1]
    assert host == "127.0.0.1"
    assert port != 20000


def test_destination_of_a_pair_of_nets(asking, server):
    """Scenario 27."""
    dnat = NATPolicy("dnat", GeneralNAT([(InetDomain("10.0.0.0/8"), InetDomain("127.0.0.0/8"))]))
    asked = asking(wanted=V4("10.0.0.1", server.port), dnat_policy=dnat)
    assert asked.connect() is not None
    server.wait_for_peers(1)
    assert str(asked.session.server_address) == f"AF_INET(127.0.0.1:{server.port})"
    assert str(asked.session.client_local) == f"AF_INET(10.0.0.1:{server.port})"


def test_static_destination_with_its_port_on_every_connection(asking, server):
    """Scenario 28."""
    dnat = NATPolicy("dnat", StaticNAT(address_of(server)))
    for count in (1, 2, 3):
        assert asking(wanted=V4("192.0.2.1", 80), dnat_policy=dnat).connect() is not None
        server.wait_for_peers(count)


def test_destination_of_port_0_takes_the_port_that_the_client_wanted(asking, server):
    dnat = NATPolicy("dnat", StaticNAT(V4("127.0.0.1", 0)))
    asked = asking(TransparentRouter(forced_port=1), wanted=V4("192.0.2.1", server.port), dnat_policy=dnat)
    assert asked.connect() is not None
    server.wait_for_peers(1)


def test_address_outside_is_refused_or_left_alone(asking, server):
    """Scenario 29."""
    nat = OneToOneNAT(InetSubnet("10.0.0.0/24"), InetSubnet("20.0.0.0/24"))
    asked = asking(wanted=address_of(server), dnat_policy=NATPolicy("strict", nat))
    assert asked.connect() is None
    assert asked.log.has("DAC policy violation; info='%s'",
                         ("DAC policy violation: IP not within the required range.",))
    assert asked.verdict == "DENIED_BY_POLICY"
    lenient = OneToOneNAT(nat.from_domain, nat.to_domain, FALSE)
    for kind in ("snat_policy", "dnat_policy"):
        asked = asking(wanted=address_of(server), **{kind: NATPolicy(kind, lenient)})
        assert asked.connect() is not None
    assert [host for host, _ in server.wait_for_peers(2)] == ["127.0.0.1", "127.0.0.1"]


def test_random_source_is_the_same_for_a_pair_while_cached(asking, server):
    """Scenario 30."""
    nat = RandomNAT([V4(f"127.0.3.{n}", 0) for n in range(1, 100)])
    cached, fresh = NATPolicy("cached", nat), NATPolicy("fresh", nat, cacheable=FALSE)
    for _ in range(8):
        assert asking(wanted=address_of(server), snat_policy=cached).connect() is not None
    assert len({host for host, _ in server.wait_for_peers(8)}) == 1
    for _ in range(8):
        assert asking(wanted=address_of(server), snat_policy=fresh).connect() is not None
    assert len({host for host, _ in server.wait_for_peers(16)[8:]}) > 1


def test_ipv4_service_with_an_ipv6_destination(asking):
    """Scenario 31: the address is the embedded one (nobody answers there)."""
    dnat = NATPolicy("dnat", NAT46())
    asked = asking(wanted=V4("192.0.2.33", 80), dnat_policy=dnat)
    asked.connect()
    assert str(asked.session.server_address) == "AF_INET6(64:ff9b::c000:221:80)"


def test_both_translations_get_the_untranslated_pair(asking, server):
    seen = []

    class Watching(AbstractNAT):
        def performTranslation(self, session, addrs, nat_type):
            seen.append((nat_type, *map(str, addrs)))
            return address_of(server) if nat_type == NAT_DNAT else V4("127.0.4.4", 0)

    asked = asking(DirectedRouter(V4("192.0.2.1", 25)), snat_policy=NATPolicy("s", Watching()),
                   dnat_policy=NATPolicy("d", Watching()))
    assert asked.connect() is not None
    assert seen == [(NAT_SNAT, "AF_INET(127.0.0.5:0)", "AF_INET(192.0.2.1:25)"),
                    (NAT_DNAT, "AF_INET(127.0.0.5:0)", "AF_INET(192.0.2.1:25)")]
    assert server.wait_for_peers(1)[0][0] == "127.0.4.4"
