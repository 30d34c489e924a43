"""The way of a plan into the kernel, and back when a step fails; in a namespace of its own."""

import dataclasses
import errno
import os
import subprocess

import pytest

from test.support.daemon import wait_until
from test.support.net import SERVER, Namespace, net
from Zorp.netfilter import backend
from Zorp.netfilter.backend import Backend, BackendError, open_backend
from Zorp.netfilter.compiler import compile_plan
from Zorp.netfilter.ipsets import SetError, Sets
from Zorp.netfilter.plan import AddressSet, Chain, Member, Rule, Table, Target, Test
from Zorp.netfilter.site import Bypass, Site
from Zorp.netfilter.tables import Change, LegacyWriter, RestoreWriter, TableError, hooks_of
from Zorp.rules.description import ForwardData, InstanceDescription, ListenerData, ProxyData, ZoneData, parse_net
from Zorp.rules.engine import RuleData

__all__ = ["net"]
pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and packet rules need root")]
KINDS = ("nft", "legacy", "python-iptables")
SETTING = {"nft": "nft", "legacy": "legacy-restore", "python-iptables": "legacy"}


@pytest.fixture
def namespace():
    """An empty namespace; run(function) runs a function in it."""
    found = Namespace(f"zorp-{os.urandom(4).hex()}-b")
    subprocess.run(["ip", "netns", "add", found.name], check=True)
    found.run("ip", "link", "set", "lo", "up")
    yield found
    subprocess.run(["ip", "netns", "del", found.name], check=True)


def plan_of(*nets, port=80, site=None):
    zone = ZoneData(name="office", nets=tuple(map(parse_net, (*nets, "2001:db8::/32"))))
    return compile_plan([InstanceDescription(
        instance="i", zones=(zone,), services=(ProxyData(name="web"),),
        rules=(RuleData(rule_id=1, service="web", dst_port=((port, port),), src_zone=("office",)),),
        listeners=(ListenerData(6, "127.0.0.1", 50080), ListenerData(6, "::1", 50080)))], site or Site())


def iptables(kind, *arguments, family=4):
    tables = "nft" if kind == "nft" else "legacy"
    subprocess.run([f"{'iptables' if family == 4 else 'ip6tables'}-{tables}", *arguments], check=True)


def writer_of(kind, way=None, **attributes):
    """Return the writer of one of KINDS; way: a class whose write() it shall have, with these attributes."""
    base, arguments = (LegacyWriter, ()) if kind == "python-iptables" else (RestoreWriter, (kind,))
    made = (base if way is None else type(way.__name__, (way, base), {}))(*arguments)
    vars(made).update(attributes)
    return made


class FailsLate:
    """Refuses to write the table mangle of IPv6, after all others were written."""

    def write(self, change):
        if (change.table.family, change.table.name) == (6, "mangle"):
            raise TableError("no more memory")
        super().write(change)


@pytest.mark.parametrize("kind", KINDS)
def test_failure_of_the_last_table_brings_the_old_state_back(namespace, kind):
    def story():
        # given a plan that is loaded
        old, new = plan_of("10.1.0.0/24"), plan_of("10.2.0.0/24", "10.3.0.0/24", port=81)
        good = Backend(Site(), writer_of(kind))
        assert good.apply(old)
        # when the next one fails at its last table
        with pytest.raises(BackendError, match="no more memory"):
            Backend(Site(), writer_of(kind, FailsLate)).apply(new)
        # then tables and sets are the old ones, and nothing is left over
        assert good.drift(old) == []
        # and the next attempt succeeds
        assert good.apply(new)
        assert good.drift(new) == []
        assert not good.apply(new)

    namespace.inside(story)


class WritesSomethingElse:
    """Writes a rule that nobody asked for."""

    def write(self, change):
        super().write(change)
        if (change.table.family, change.table.name) == (4, "mangle"):
            command = "iptables-nft" if self.name == "nft" else "iptables-legacy"
            subprocess.run([command, "-t", "mangle", "-A", "ZORP_EVAL", "-p", "0", "-j", "ACCEPT"], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rules_that_are_read_back_otherwise_do_not_stay(namespace, kind):
    def story():
        old, new = plan_of("10.1.0.0/24"), plan_of("10.2.0.0/24", port=81)
        good = Backend(Site(), writer_of(kind))
        assert good.apply(old)
        with pytest.raises(BackendError, match="does not hold what it was given: iptables table mangle"):
            Backend(Site(), writer_of(kind, WritesSomethingElse)).apply(new)
        assert good.drift(old) == []

    namespace.inside(story)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_that_cannot_be_undone_says_so(namespace, kind, monkeypatch):
    def story():
        # given a plan whose last table cannot be written, and a kernel that has no room for the old state either
        real, begun = backend.undo, []

        def undo(change, before, tables):
            begun.append(change.table.name)
            if len(begun) == 1:
                raise TableError("iptables table mangle, going back: no more memory at all")
            real(change, before, tables)

        monkeypatch.setattr(backend, "undo", undo)
        with pytest.raises(BackendError, match=r"^no more memory; .* going back: no more memory at all$"):
            Backend(Site(), writer_of(kind, FailsLate)).apply(plan_of("10.1.0.0/24"))
        # then the other tables are put back all the same
        assert len(begun) == 5
        assert [name for family in (4, 6) for name, held in writer_of(kind).read(family).items() if held.ours] == [
            "mangle"]

    namespace.inside(story)


COMMENTS = {"Latin-1": b"caf\xe9", "another end of a line": "one\u2028COMMIT\x0bCOMMIT\x85COMMIT".encode()}


@pytest.mark.parametrize("comment", COMMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_site_writes_into_a_comment_packet_rules_are_read_loaded_and_removed(namespace, kind, comment):
    def story():
        # given rules of the site with a comment that is no UTF-8, or holds what may be taken for the end of a line
        for family in (4, 6):
            for table in ("mangle", "nat", "filter"):
                iptables(kind, "-t", table, "-A", "OUTPUT", "-m", "comment", "--comment", COMMENTS[comment],
                         "-j", "ACCEPT", family=family)
        firewall, plan = Backend(Site(), writer_of(kind)), plan_of("10.1.0.0/24")
        # then packet rules can be had, from the guard of a starting host on
        assert firewall.guard()
        assert firewall.apply(plan)
        assert firewall.drift(plan) == []
        # and the site's are shown and stay
        shown = firewall.foreign()[4, "filter"].builtin["OUTPUT"]
        assert len(shown) == 1
        assert shown[0].encode().endswith(b"-j ACCEPT")
        firewall.unload()
        assert firewall.is_unloaded()
        assert firewall.foreign()[4, "filter"].builtin["OUTPUT"] == shown

    namespace.inside(story)


def test_a_program_that_cannot_be_started_is_said(monkeypatch):
    def no_room(*arguments, **keywords):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", no_room)
    with pytest.raises(BackendError, match="iptables-nft-save cannot be started: Resource temporarily unavailable"):
        Backend(Site(), writer_of("nft")).foreign()
    with pytest.raises(TableError, match=r"python-iptables: .* cannot be started: Resource temporarily unavailable"):
        writer_of("python-iptables").test(Change(Table(4, "nat", (), ())))


class Killed(BaseException):
    """What a SIGKILL looks like from inside: nothing is put right."""


class DiesBefore:
    """Is killed when sets have their new members, and before it writes the table mangle of this family."""

    def write(self, change):
        if (change.table.family, change.table.name) == (self.family, "mangle"):
            raise Killed
        super().write(change)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [4, 6])
def test_a_load_that_is_killed_leaves_no_way_past_the_proxy_and_the_next_repairs_it(net, kind, family):
    # given rules that divert a client's port 80 to a proxy, which is not there
    net.firewall.configure(SETTING[kind])
    for each in (4, 6):
        net.firewall.iptables("-P", "FORWARD", "ACCEPT", family=each)
    old, new = plan_of("10.1.0.0/24"), plan_of("10.1.0.0/25", port=81)
    good = Backend(Site(), writer_of(kind))
    net.firewall.inside(lambda: good.apply(old))
    server = net.server.listen(SERVER, 80)
    # when the next load is killed between the sets and the rules
    with pytest.raises(Killed):
        net.firewall.inside(lambda: Backend(Site(), writer_of(kind, DiesBefore, family=family)).apply(new))
    # then nothing of the client reaches the server
    with pytest.raises(TimeoutError):
        net.client.connect(SERVER, 80, timeout_s=0.3)
    assert server.nobody_came(within_s=0.1)
    # and the next load leaves exactly what it wants
    assert net.firewall.inside(lambda: good.apply(new))
    assert net.firewall.inside(lambda: good.drift(new)) == []
    assert not [name for name in net.firewall.run("ipset", "list", "-n").stdout.split() if name.startswith("zorp.~")]


def moving_plan(office, lab, service):
    """Return the plan for two zones of one net each, the first of which has port 80."""
    zones = (ZoneData(name="office", nets=(parse_net(office),)), ZoneData(name="lab", nets=(parse_net(lab),)))
    return compile_plan([InstanceDescription(
        instance="i", zones=zones, services=(service,),
        rules=(RuleData(rule_id=1, service=service.name, dst_port=((80, 80),), src_zone=("office",)),),
        listeners=(ListenerData(6, "127.0.0.1", 50080), ListenerData(6, "::1", 50080)))], Site())


class LooksBetween:
    """Calls a function before every table that it writes."""

    def write(self, change):
        self.look()
        super().write(change)


@pytest.mark.parametrize("kind", KINDS)
def test_nets_that_move_to_a_zone_in_force_are_not_forwarded_between_sets_and_tables(net, kind):
    # given a zone that is forwarded, and a client outside it
    net.firewall.configure(SETTING[kind])
    old = moving_plan("10.9.0.0/24", "10.1.0.0/24", ForwardData(name="fwd"))
    new = moving_plan("10.1.0.0/24", "10.9.0.0/24", ProxyData(name="web"))
    net.firewall.inside(lambda: Backend(Site(), writer_of(kind)).apply(old))
    server = net.server.listen(SERVER, 80)
    tried = []

    def look():
        with pytest.raises(TimeoutError):
            net.client.connect(SERVER, 80, timeout_s=0.2)
        tried.append(True)

    # when the zone gets the client's net and a proxy in one load, and the client tries at every step
    net.firewall.inside(lambda: Backend(Site(), writer_of(kind, LooksBetween, look=look)).apply(new))
    # then it is never forwarded, and what is left is the new policy alone
    assert tried
    assert server.nobody_came(within_s=0.1)
    assert net.firewall.inside(lambda: Backend(Site(), writer_of(kind)).drift(new)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_set_that_a_rule_of_the_site_uses_stays_until_the_load_after(namespace, kind):
    def story():
        backend = Backend(Site(export_zone_sets=True), writer_of(kind))
        old = plan_of("10.1.0.0/24", site=Site(export_zone_sets=True))
        new = plan_of("10.2.0.0/24", port=81)
        backend.apply(old)
        rule = ("INPUT", "-m", "set", "--match-set", "zorp.tree4.office", "src", "-j", "ACCEPT")
        iptables(kind, "-A", *rule)
        # when the next policy has no such set
        assert backend.apply(new)
        # then it is in force, and the set is there, too
        assert backend.drift(new) == []
        assert not backend.apply(new)
        with Sets() as sets:
            assert [name for name in sets.names() if "tree" in name] == ["zorp.tree4.office"]
        # and a load takes it away when nobody uses it any more
        iptables(kind, "-D", *rule)
        wait_until(lambda: backend.drift(new) == ["set zorp.tree4.office is left over"], "the end of the rule")
        assert backend.apply(new)
        assert backend.drift(new) == []
        with Sets() as sets:
            assert sorted(sets.names()) == [members.name for members in new.sets]

    namespace.inside(story)


def test_nothing_can_be_unloaded_but_a_set_that_a_rule_of_the_site_uses(namespace):
    def story():
        backend = open_backend(Site())
        backend.apply(plan_of("10.1.0.0/24", site=Site(export_zone_sets=True)))
        iptables("nft", "-A", "INPUT", "-m", "set", "--match-set", "zorp.tree4.office", "src", "-j", "ACCEPT")
        backend.unload()
        with Sets() as sets:
            assert sets.names() == ["zorp.tree4.office"]

    namespace.inside(story)


def test_kernel_that_says_otherwise_about_sets_keeps_the_old_rules(namespace, monkeypatch):
    def story():
        backend = open_backend(Site())
        old = plan_of("10.1.0.0/24")
        backend.apply(old)
        # when sets are not what they were made before the tables are written
        monkeypatch.setattr(Sets, "load", lambda self, wanted: False)
        with pytest.raises(BackendError, match=r"does not hold what it was given: set zorp\.4\.office~\w+ is missing"):
            backend.apply(plan_of("10.2.0.0/24", port=81))
        # then the old policy is in force
        assert backend.drift(old) == []

    namespace.inside(story)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", ["load", "unload"])
def test_family_that_is_used_no_longer_is_cleared(namespace, kind, ends):
    def story():
        # given rules of both families
        Backend(Site(), writer_of(kind)).apply(plan_of("10.1.0.0/24"))
        iptables(kind, "-A", "INPUT", "-p", "tcp", "-j", "ACCEPT", family=6)
        # when the site uses IPv4 only from now on
        site = Site(families=(4,))
        backend, plan = Backend(site, writer_of(kind)), plan_of("10.1.0.0/24", site=site)
        assert "ip6tables table mangle: chain ZORP is left over" in backend.drift(plan)
        if ends == "load":
            assert backend.apply(plan)
            assert backend.drift(plan) == []
        else:
            backend.unload()
        # then IPv6 has nothing of ours, and all that is the site's
        held = writer_of(kind).read(6)
        assert not any(table.ours or hooks_of(table) for table in held.values())
        assert sum(len(lines) for lines in held["filter"].builtin.values()) == 1
        with Sets() as sets:
            assert not [name for name in sets.names() if name.startswith("zorp.6")]
        shown = subprocess.run(["ip", "-6", "rule"], capture_output=True, text=True, check=True).stdout
        assert "fwmark" not in shown

    namespace.inside(story)


@pytest.mark.parametrize("kind", KINDS)
def test_failure_of_the_first_load_leaves_nothing(namespace, kind):
    def story():
        with pytest.raises(BackendError):
            Backend(Site(), writer_of(kind, FailsLate)).apply(plan_of("10.1.0.0/24"))
        with Sets() as sets:
            assert sets.names() == []
        for family in (4, 6):
            assert all(not held.ours for held in writer_of(kind).read(family).values())

    namespace.inside(story)


def test_rule_that_the_kernel_refuses_is_shown(namespace):
    def story():
        plan = plan_of("10.1.0.0/24")
        wrong = Chain("ZORP_WRONG", (Rule((Test("set-src", "zorp.4.nowhere"),), Target("drop")),))
        tables = tuple(Table(table.family, table.name, (*table.chains, wrong), table.hooks)
                       if (table.family, table.name) == (4, "mangle") else table for table in plan.tables)
        with pytest.raises(BackendError, match=r"table mangle: .*nowhere.*; at: -A ZORP_WRONG -m set"):
            open_backend(Site()).apply(dataclasses.replace(plan, tables=tables))

    namespace.inside(story)


def named_plan(*addresses, inner="10.1.0.64/26"):
    """Return the plan for a zone that is a host name with these addresses, inside a zone of nets."""
    nets = tuple(map(parse_net, addresses))
    zones = (ZoneData(name="office", nets=(parse_net("10.1.0.0/24"),)),
             ZoneData(name="guests", nets=(parse_net(inner),)),
             ZoneData(name="partner", hostnames=("partner.test",), nets=nets, addresses=nets))
    return compile_plan([InstanceDescription(
        instance="i", zones=zones, services=(ProxyData(name="web"),),
        rules=(RuleData(rule_id=1, service="web", src_zone=("office",)),
               RuleData(rule_id=2, service="web", src_zone=("partner",))),
        listeners=(ListenerData(6, "127.0.0.1", 50080), ListenerData(6, "::1", 50080)))], Site())


def test_members_change_without_the_rules(namespace):
    def story():
        backend = open_backend(Site())
        backend.apply(named_plan("192.0.2.1/32"))
        # when only the addresses of a host name change, one of them inside another zone
        changed = named_plan("192.0.2.2/32", "10.1.0.5/32")
        assert backend.update_sets(changed)
        # then the kernel holds the whole new plan
        assert backend.drift(changed) == []
        assert not backend.update_sets(changed)

    namespace.inside(story)


def test_sets_hold_exceptions_and_what_a_killed_program_left_is_removed(namespace):
    def story():
        members = (Member("0.0.0.0/1"), Member("10.1.0.0/24"), Member("10.1.0.64/26", nomatch=True),
                   Member("128.0.0.0/1"))
        many = tuple(Member(f"2001:db8:{a:x}:{b:x}::/64") for a in range(1, 11) for b in range(1, 101))
        wanted = (AddressSet("zorp.4.a", 4, members), AddressSet("zorp.6.b", 6, many))
        with Sets() as sets:
            subprocess.run(["ipset", "create", "zorp.~left", "hash:net"], check=True)
            sets.load(wanted)
            sets.finish()
            assert sets.names() == ["zorp.4.a", "zorp.6.b"]
            present = sets.read()
            assert {name: frozenset(found.members) for name, found in present.items()} == {
                "zorp.4.a": frozenset(members), "zorp.6.b": frozenset(many)}
        statuses = [subprocess.run(["ipset", "test", "zorp.4.a", address], capture_output=True, check=False).returncode
                    for address in ("10.1.0.6", "10.1.0.66")]
        assert statuses == [0, 1]

    namespace.inside(story)


def test_nets_whose_text_has_two_forms_are_read_back_as_written(namespace):
    def story():
        # given nets of IPv6 that can be written with the last four bytes as in IPv4, in zones, rules and settings
        nets = tuple(map(parse_net, ("::1.2.3.4/128", "::9.2.3.0/120", "::ffff:0:0/96")))
        site = Site(bypass=(Bypass(src="::102:304/128", dst="::ffff:7.7.7.7/128"),))
        plan = compile_plan([InstanceDescription(
            instance="i", zones=(ZoneData(name="z", nets=nets),), services=(ProxyData(name="web"),),
            rules=(RuleData(rule_id=1, service="web", src_zone=("z",)),
                   RuleData(rule_id=2, service="web", src_subnet=nets),
                   RuleData(rule_id=3, service="web", dst_subnet=nets[:1])),
            listeners=(ListenerData(6, "::1", 50080),))], site)
        # then they are the same to us when they are read
        backend = open_backend(site)
        assert backend.apply(plan)
        assert not backend.apply(plan)

    namespace.inside(story)


def test_set_that_cannot_be_filled_leaves_the_old_one(namespace):
    def story():
        good = AddressSet("zorp.4.a", 4, (Member("10.0.0.0/8"),))
        with Sets() as sets:
            sets.load((good,))
            sets.finish()
            twice = AddressSet("zorp.4.a", 4, (Member("10.0.0.0/8"), Member("0.0.0.0/0")))
            with pytest.raises(SetError, match="filling set"):
                sets.load((twice,))
            assert sets.names() == ["zorp.4.a"]
            assert sets.read()["zorp.4.a"].members == good.members

    namespace.inside(story)
