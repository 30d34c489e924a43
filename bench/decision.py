"""What a decision costs: the rule of a connection, and the zone of an address, in microseconds of CPU.

Goals: 10 000 rules cost at most 1.5 times as much as 10, and 100 000 subnets 1.5 times as much as
100.  Rules are measured the whole way, RuleSet.evaluate() with its two zone look-ups; each of
the packets meets some rule.  "seen" decides packets of kinds that came before, as nearly all
are; "new combination" packets whose source, destination and port were seen, but not together.

All sizes are measured in turns, round after round, and the best round of each counts: what is
left then is the work itself and not the neighbours on the machine.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable

from Zorp import Globals
from Zorp.Constants import AF_INET, AF_INET6
from Zorp.Rule import Packet, PortRange, RuleSet
from Zorp.rules.engine import Memo
from Zorp.SockAddr import from_ip_int
from Zorp.Zone import Zone
from Zorp.zones.table import ZoneTable

RULES = (10, 100, 1_000, 10_000)
SUBNETS = (100, 1_000, 100_000)
LIMIT = 1.5
ROUNDS = 15
PACKETS = 2_000
LOOKUPS = 5_000
ZONES = 100
PORTS = (22, 25, 80, 443, 8080)

# family: bits of an address, first bits of all nets, length of that prefix, length of the nets
NETS = {"IPv4": (AF_INET, 32, 10, 8, 30), "IPv6": (AF_INET6, 128, 0x20010DB8, 32, 56)}


def run() -> list[dict]:
    """Return a row per measurement: what, how many, microseconds, ratio to the smallest, whether the goal is met."""
    return [*rule_rows(), *(row for name in NETS for row in zone_rows(name))]


def measured(jobs: dict[int, tuple[Callable, list]], prepare: Callable[[int], None] | None = None) -> dict[int, float]:
    """Return microseconds per call of each job, (function, arguments to call it with one by one)."""
    best = dict.fromkeys(jobs, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for number, (function, arguments) in jobs.items():
                if prepare is not None:
                    prepare(number)
                start = time.thread_time_ns()
                for argument in arguments:
                    function(argument)
                spent = time.thread_time_ns() - start
                best[number] = min(best[number], spent / len(arguments) / 1000)
    finally:
        gc.enable()
    return best


def rows(what: str, figures: dict[int, float], *, has_goal: bool = True) -> list[dict]:
    first, last = min(figures), max(figures)
    made = []
    for number, microseconds in figures.items():
        ratio = microseconds / figures[first]
        row = {"what": what, "number": number, "us": round(microseconds, 2), "ratio": round(ratio, 2)}
        if has_goal and number == last:
            row |= {"goal": LIMIT, "met": ratio <= LIMIT}
        made.append(row)
    return made


# ------------------------------------------------------------------ rules

def rule_rows() -> list[dict]:
    saved = dict(Globals.zones), dict(Globals.services)
    try:
        _define_zones()
        sets = {number: rule_set(number) for number in RULES}
        jobs = {number: (rules.evaluate, packets(rules)) for number, rules in sets.items()}
        seen = measured(jobs)

        def forget_combinations(number):
            sets[number]._engine._winners = Memo(1 << 20)

        fresh = measured(jobs, forget_combinations)
    finally:
        Zone.zone_subnet_tree.clear()
        for registry, content in zip((Globals.zones, Globals.services), saved, strict=True):
            registry.clear()
            registry.update(content)
    return rows("rules, seen", seen) + rows("rules, new combination", fresh, has_goal=False)


def _define_zones() -> None:
    """A zone for everything and a hundred in three levels, each with a net of its own."""
    Zone.zone_subnet_tree.clear()
    Globals.zones.clear()
    Globals.services["service"] = object()
    Zone("internet", ["0.0.0.0/0", "::/0"])
    for number in range(ZONES):
        parent = None if number < 10 else f"zone{number % 10}"
        Zone(f"zone{number}", f"10.{number}.0.0/16", admin_parent=parent)


def rule_set(number: int) -> RuleSet:
    """Return that many rules as policies have them: ports, zones on both sides, subnets of offices, single servers."""
    chance = random.Random(number)

    def zone() -> str:
        return f"zone{chance.randrange(ZONES)}"

    def rule() -> dict:
        port = chance.choice((*PORTS, chance.randrange(1024, 65536), PortRange(8000, 8000 + chance.randrange(100))))
        source = chance.choice(({"src_zone": zone()}, {"src_zone": (zone(), zone())},
                                {"src_subnet": f"10.{chance.randrange(ZONES)}.{chance.randrange(256)}.0/24"}))
        target = chance.choice(({"dst_zone": "internet"}, {"dst_zone": zone()},
                                {"dst_subnet": f"172.{chance.randrange(256)}.{chance.randrange(256)}.9"}))
        return {"service": "service", "proto": 6, "dst_port": port} | source | target

    return RuleSet.from_descriptions([rule() for _ in range(number)])


def packets(rules: RuleSet) -> list[Packet]:
    """Return packets of which each meets some rule."""
    chance = random.Random(0)
    data = rules.data()
    made = []
    while len(made) < PACKETS:
        rule = chance.choice(data)
        packet = Packet(6, _address_for(rule.src_subnet, rule.src_zone, chance),
                        _address_for(rule.dst_subnet, rule.dst_zone, chance),
                        chance.randrange(1024, 65536), chance.randint(*rule.dst_port[0]))
        if rules.evaluate(packet) is not None:
            made.append(packet)
    return made


def _address_for(subnets, zones, chance: random.Random):
    if subnets:
        value = subnets[0].network + chance.randrange(1 << (32 - subnets[0].bits))
    else:
        subnet = Zone.lookupByName(chance.choice(zones)).subnets[0]
        value = subnet.network_int + chance.randrange(1 << (32 - subnet.mask_bits))
    return from_ip_int(AF_INET, value, 0)


# ------------------------------------------------------------------ zones

def zone_rows(family_name: str) -> list[dict]:
    jobs = {}
    for number in SUBNETS:
        table, addresses = zone_table(family_name, number)
        jobs[number] = table.lookup, addresses
    return rows(f"zone look-up, {family_name}", measured(jobs))


def zone_table(family_name: str, number: int) -> tuple[ZoneTable, list]:
    """Return a table of that many subnets of fifty zones, and addresses inside them, all different."""
    family, width, prefix, prefix_bits, bits = NETS[family_name]
    chance = random.Random(number)
    networks: dict[int, None] = {}
    while len(networks) < number:
        inside = chance.getrandbits(bits - prefix_bits)
        networks[(prefix << (bits - prefix_bits) | inside) << (width - bits)] = None
    table = ZoneTable()
    zones = [object() for _ in range(50)]
    for network in networks:
        table.add(chance.choice(zones), [(family, network, bits)], ())
    table.compile()
    starts = list(networks)
    return table, [from_ip_int(family, chance.choice(starts) + chance.getrandbits(width - bits), 0)
                   for _ in range(LOOKUPS)]
