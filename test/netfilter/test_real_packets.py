"""The kernel decides as the daemon does: random policies loaded, random packets sent, both asked.

What a packet met is told by a log group: each action chain ZORP_R<index> gets one more rule in
front, which logs the index, and a rule of the site behind ours logs what came through without.
Half of the policies have host names, of which several zones share addresses.
"""

import contextlib
import dataclasses
import ipaddress
import socket

import pytest

from test.support.daemon import wait_until
from test.support.disputes import by_definition
from test.support.net import net
from test.support.packet_model import CLOSED
from test.support.packets import Wire, frame_of
from test.support.random_policies import Generator
from Zorp.netfilter.backend import Backend
from Zorp.netfilter.compiler import compile_plan
from Zorp.netfilter.evaluation import CLOSED_CHAIN
from Zorp.netfilter.instance_zones import InstanceZones
from Zorp.netfilter.nflog import LogGroup
from Zorp.netfilter.plan import Rule, Target
from Zorp.netfilter.site import Site
from Zorp.netfilter.tables import RestoreWriter

__all__ = ["net"]
pytestmark = pytest.mark.netns

IFACES = ("eth0", "eth1", "eth2", "dmz", "other")
POLICIES, NAMED_POLICIES, PACKETS_PER_POLICY = range(5), (4, 21, 22, 25, 34), 60        # seeds
GROUP = 5
ECHO = {socket.AF_INET: (1, 8), socket.AF_INET6: (58, 128)}        # what begins a connection among ICMP
WIDTH = {socket.AF_INET: 4, socket.AF_INET6: 16}


class Street:
    """The firewall with five more interfaces, a wire to each, and a log of what packets met."""

    def __init__(self, net, stack: contextlib.ExitStack) -> None:
        self._firewall = net.firewall
        self._wires, self._macs, self._addresses = {}, {}, {}
        for number, iface in enumerate(IFACES, start=1):
            mac = f"02:00:00:00:00:{number:02x}"
            self._firewall.run("ip", "link", "add", iface, "address", mac, "type", "veth", "peer", "name", f"w{iface}",
                               "netns", net.client.name)
            self._addresses[iface] = {socket.AF_INET: (10 << 24) + number, socket.AF_INET6: (0x20010DB8 << 96) + number}
            for address in self._addresses[iface].values():
                self._firewall.run("ip", "addr", "add", str(ipaddress.ip_address(address)), "dev", iface,
                                   *(("nodad",) if address >> 32 else ()))
            self._firewall.run("ip", "link", "set", iface, "up")
            net.client.run("ip", "link", "set", f"w{iface}", "up")
            self._macs[iface] = bytes.fromhex(mac.replace(":", ""))
            self._wires[iface] = stack.enter_context(contextlib.closing(Wire(net.client, f"w{iface}")))
        self._log = stack.enter_context(contextlib.closing(self._firewall.inside(lambda: LogGroup(GROUP))))
        self._sent = set()

    def log_what_came_through(self, site: Site) -> None:
        """Write a rule of the site behind ours."""
        for family in (4, 6):
            self._firewall.iptables("-t", "mangle", "-A", "PREROUTING", "-m", "connmark", "--mark",
                                    f"0/{site.marks.connection_mask:#x}", "-j", "NFLOG", "--nflog-group", str(GROUP),
                                    "--nflog-prefix", "none", family=family)

    def load(self, generator: Generator, plan, backend: Backend) -> None:
        """Give the kernel a plan, and interfaces the groups that the generator's packets have."""
        for iface in IFACES:
            self._firewall.run("ip", "link", "set", iface, "group", str(generator.groups.get(iface, 9)))
        self._firewall.inside(lambda: backend.apply(_telling(plan)))

    def packet(self, generator: Generator):
        """Return a packet that begins a connection, or None when this one would not."""
        packet = generator.packet()
        if packet.proto in (protocol for protocol, _ in ECHO.values() if protocol != ECHO[packet.family][0]):
            return None                                  # invalid to connection tracking: ICMP of the other family
        if packet.proto == ECHO[packet.family][0]:
            packet = packet._replace(proto_type=ECHO[packet.family][1])
        if generator.random.random() < 0.2:
            iface = generator.random.choice(IFACES)
            packet = packet._replace(dst=self._addresses[iface][packet.family])
        ends = [ipaddress.ip_address(end.to_bytes(WIDTH[packet.family], "big")) for end in (packet.src, packet.dst)]
        key = _key(packet.family, packet.proto, str(ends[0]), packet.src_port, str(ends[1]), packet.dst_port)
        if key in self._sent or any(end.is_multicast or end.is_loopback or end.is_unspecified for end in ends):
            return None
        self._sent |= {key, (key[0], key[1], *key[4:], *key[2:4])}         # its answers are no new connection, either
        return packet._replace(reqids=(), dst_on_iface=self._addresses[packet.iface][packet.family] == packet.dst), key

    def what_they_meet(self, packets) -> dict:
        """Send packets; return the prefix of the log by the key of each."""
        met = {}

        def all_told() -> bool:
            for logged in self._log.read():
                met.setdefault(_key(logged.family, logged.protocol, logged.source, logged.source_port,
                                    logged.destination, logged.destination_port), logged.prefix)
            return all(key in met for _, key in packets)

        for packet, _ in packets:
            wire = self._wires[packet.iface]
            wire.send(frame_of(packet, self._macs[packet.iface], wire.mac))
        wait_until(all_told, "the log of all packets")
        return met


def _key(*values) -> tuple:
    return values


def _telling(plan):
    """Return the plan with the index logged first by every action."""
    tables = []
    for table in plan.tables:
        chains = tuple(
            dataclasses.replace(chain, rules=(Rule((), Target("nflog", (GROUP, chain.name))), *chain.rules))
            if chain.name == CLOSED_CHAIN or (chain.name[:6] == "ZORP_R" and chain.name[6:].isdigit()) else chain
            for chain in table.chains)
        tables.append(dataclasses.replace(table, chains=chains))
    return dataclasses.replace(plan, tables=tuple(tables))


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_real_packets_meet_the_rule_that_the_engine_finds(net, kind):
    # given a firewall with interfaces of several groups
    net.firewall.configure("nft" if kind == "nft" else "legacy-restore")
    backend = Backend(Site(), RestoreWriter(kind))
    matched = closed = compared = 0
    with contextlib.ExitStack() as stack:
        street = Street(net, stack)
        for number, seed in enumerate((*POLICIES, *NAMED_POLICIES)):
            # when a random policy replaces the one before
            generator = Generator(seed)
            descriptions, answers = (
                (generator.instances(), {}) if number < len(POLICIES) else generator.named_instances())
            zones = [InstanceZones(description) for description in descriptions]
            for one in zones:
                one.feed(answers)
            descriptions = [one.described() for one in zones]
            site = Site(split_above=generator.random.choice((1, 8, 1_000)))
            plan = compile_plan(descriptions, site)
            street.load(generator, plan, backend)
            if not number:
                street.log_what_came_through(site)
            # and packets come in
            packets = [found for _ in range(PACKETS_PER_POLICY) if (found := street.packet(generator))]
            met = street.what_they_meet(packets)
            # then each meets the rule that matches best, or none, or is dropped because zones do not agree
            rules = {(rule.instance, rule.rule_id): f"ZORP_R{rule.index}" for rule in plan.indexes}
            rules |= {CLOSED: CLOSED_CHAIN, None: "none"}
            for packet, key in packets:
                assert met[key] == rules[by_definition(descriptions, answers, packet)], f"seed {seed}: {packet}"
                matched += met[key] not in ("none", CLOSED_CHAIN)
                closed += met[key] == CLOSED_CHAIN
            compared += len(packets)
    assert compared >= 400
    assert matched >= 200
    assert closed >= 10
