"""Plans in the words of iptables, and iptables-save in ours."""

import pytest

from Zorp.netfilter.plan import Chain, Hook, Rule, Table, Target, Test
from Zorp.netfilter.render import canonical, expected, line_of, parse_save, text_of
from Zorp.netfilter.tables import change_to

LINES = {
    "everything plain": ((Test("iface", "eth0"), Test("proto", 6), Test("dport", (80, 90)), Test("src", "10.0.0.0/8")),
                         Target("goto", ("ZORP_R1",)),
                         "-A X -s 10.0.0.0/8 -i eth0 -p tcp -m tcp --dport 80:90 -g ZORP_R1"),
    "two ports": ((Test("proto", 17), Test("sport", (1, 1)), Test("dport", (2, 2))), Target("drop"),
                  "-A X -p udp -m udp --sport 1 --dport 2 -j DROP"),
    "sets": ((Test("set-src", "zorp.4.a"), Test("set-dst", "zorp.4.b")), Target("drop"),
             "-A X -m set --match-set zorp.4.a src -m set --match-set zorp.4.b dst -j DROP"),
    "not": ((Test("connmark", (1, 3), negated=True), Test("state", "INVALID", negated=True)), Target("return"),
            "-A X -m connmark ! --mark 0x1/0x3 -m conntrack ! --ctstate INVALID -j RETURN"),
    "diversion": ((Test("proto", 6),), Target("tproxy", ("127.0.0.1", 50080, 0x80000000, 0x80000000)),
                  "-A X -p tcp -j TPROXY --on-port 50080 --on-ip 127.0.0.1 --tproxy-mark 0x80000000/0x80000000"),
    "own address": ((Test("local"),), Target("accept"), "-A X -m addrtype --dst-type LOCAL --limit-iface-in -j ACCEPT"),
}


@pytest.mark.parametrize(("tests", "target", "line"), LINES.values(), ids=LINES)
def test_line(tests, target, line):
    assert line_of("X", Rule(tests, target), 4) == line


def test_six_has_its_own_words():
    assert line_of("X", Rule((Test("icmp", (128, None)),), Target("dnat", ("2001:db8::1", 80))), 6) == \
        "-A X -m icmp6 --icmpv6-type 128 -j DNAT --to-destination [2001:db8::1]:80"


@pytest.mark.parametrize(("one", "other"), [
    ("-A X -p tcp -m tcp --dport 80 -j DROP", "-A X -p 6 --dport 80 -j DROP"),
    ("-A X -s 10.0.0.1/32 -i a -j DROP", "-A X -i a -s 10.0.0.1 -j DROP"),
    ("-A X -s ::102:304/128 -d ::1 -j DROP", "-A X -s ::1.2.3.4 -d 0:0::1/128 -j DROP"),
    ("-A X -m devgroup --src-group 0x2 -j DROP", "-A X -m devgroup --src-group 0x02 -j DROP"),
])
def test_spellings_of_one_rule_are_equal(one, other):
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(("one", "other"), [
    ("-A X -m mark --mark 0x1/0x1 -j DROP", "-A X -m mark ! --mark 0x1/0x1 -j DROP"),
    ("-A X -j Y", "-A X -g Y"),
    ("-A X -m set --match-set a src -m set --match-set a src -j Y", "-A X -m set --match-set a src -j Y"),
    ("-A X -m set --match-set a src -j Y", "-A X -m set --match-set a dst -j Y"),
])
def test_different_rules_are_different(one, other):
    assert canonical(one) != canonical(other)


def test_names_that_a_host_gave_to_interface_groups_are_read_as_numbers(tmp_path, monkeypatch):
    names = tmp_path / "group"
    monkeypatch.setattr("Zorp.netfilter.render._GROUP_NAMES", names)
    assert canonical("-A X -m devgroup --src-group lan -j Y") != canonical("-A X -m devgroup --src-group 0x7 -j Y")
    names.write_text("# groups of this host\n0 default\n0x7\tlan  # ours\nnonsense\n\n9\n")
    assert canonical("-A X -m devgroup --src-group lan -j Y") == canonical("-A X -m devgroup --src-group 0x7 -j Y")


def test_words_that_would_break_a_line_are_refused():
    with pytest.raises(ValueError, match="not a value"):
        line_of("X", Rule((Test("iface", 'a"\n-A INPUT'),), Target("drop")), 4)


SAVED = """*filter
:INPUT DROP [3:4]
:FORWARD ACCEPT [0:0]
:SITE - [0:0]
:ZORP_OLD - [0:0]
:ZORP_INPUT - [0:0]
-A INPUT -j ZORP_INPUT
-A INPUT -j ZORP_INPUT
-A FORWARD -j ZORP_OLD
-A SITE -j DROP
-A ZORP_INPUT -j ACCEPT
COMMIT
"""


def test_change_replaces_what_is_ours_and_nothing_else():
    # given a table with our old chains, jumps to them (one of them twice), and rules of the site
    held = parse_save(SAVED)["filter"]
    assert held.policies == {"INPUT": "DROP", "FORWARD": "ACCEPT"}
    assert held.foreign == ("-A SITE -j DROP",)
    # when it is to hold a plan
    chain = Chain("ZORP_FORWARD", (Rule((), Target("drop")),))
    chains = (Chain("ZORP_INPUT", (Rule((), Target("accept")),)), chain)
    wanted = Table(4, "filter", chains, (Hook("INPUT", "ZORP_INPUT"), Hook("FORWARD", "ZORP_FORWARD")))
    change = change_to(wanted, held, "first")
    # then this is the change: chains that say what they shall say already are left alone
    wanted = Table(4, "filter", (chain,), wanted.hooks)
    assert change.remove == ("ZORP_OLD",)
    assert change.insert == (("FORWARD", "ZORP_FORWARD"),)
    assert sorted(change.delete) == [("FORWARD", "ZORP_OLD"), ("INPUT", "ZORP_INPUT")]
    assert change.text() == text_of(wanted, remove=["ZORP_OLD"], add_hooks=[
        "-D FORWARD -j ZORP_OLD", "-D INPUT -j ZORP_INPUT", "-I FORWARD -j ZORP_FORWARD"])
    assert held.ours["ZORP_INPUT"] == expected(chains, 4)["ZORP_INPUT"]


def test_hooks_of_the_site_s_own_stay():
    held = parse_save(SAVED)["filter"]
    wanted = Table(4, "filter", (Chain("ZORP_INPUT", ()), Chain("ZORP_OLD", ())), ())
    change = change_to(wanted, held, "none")
    assert (change.insert, change.append, change.delete) == ((), (), ())
