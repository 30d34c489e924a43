"""What packet rules cost: compiling and loading them, and the rules that a first packet meets.

Large policies as sites have them: 1000 zones and 2000 rules that each ask for a zone of the client,
one of the server and a port; once with a port per rule, once with five ports for all.

    compile      seconds of CPU from descriptions to the plan
    load         seconds of wall time into an empty kernel, both families, reading back included
    again        the same for a plan that the kernel holds
    one rule     the same for a plan in which one rule has changed
    met          rules that the first packet of a connection meets before its fate is decided: mean,
                 median, most, over random packets, of which four in five match a rule

Loading needs root: it runs in a network namespace of its own, with either kind of iptables.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time

from test.support.packet_model import Model
from Zorp.netfilter.backend import Backend
from Zorp.netfilter.compiler import IndexState, compile_plan
from Zorp.netfilter.plan import Plan
from Zorp.netfilter.site import Site
from Zorp.netfilter.tables import RestoreWriter
from Zorp.rules.description import (
    DenyData,
    ForwardData,
    InstanceDescription,
    ListenerData,
    ProxyData,
    ZoneData,
    parse_net,
)
from Zorp.rules.engine import RuleData, Traffic

ZONES, RULES = 1000, 2000
PACKETS = 2000
MOST_MET = 20                    # goal for the median
KINDS = ("nft", "legacy")
SHAPES = {"a port per rule": RULES, "five ports": 5}


def description(ports: int, rules: int = RULES, zones: int = ZONES) -> InstanceDescription:
    """Return an instance whose rules share this many ports; equal arguments, equal instance."""
    chance = random.Random(ports)
    numbers = chance.sample(range(1, 60_000), ports)
    nets = [(f"10.{number >> 8}.{number & 255}.0/24", f"fd00:{number:x}::/32") for number in range(zones)]
    return InstanceDescription(
        instance="site",
        zones=(ZoneData(name="internet", nets=(parse_net("0.0.0.0/0"), parse_net("::/0"))),
               *(ZoneData(name=f"zone{number}", nets=tuple(map(parse_net, pair))) for number, pair in enumerate(nets))),
        services=(ProxyData(name="web"), ForwardData(name="fwd"), DenyData(name="no")),
        rules=tuple(RuleData(
            rule_id=number + 1, service=chance.choice(("web", "fwd", "no")), proto=(6,),
            dst_port=((numbers[number % ports],) * 2,), src_zone=(f"zone{chance.randrange(zones)}",),
            dst_zone=(chance.choice(("internet", f"zone{chance.randrange(zones)}")),)) for number in range(rules)),
        listeners=tuple(ListenerData(protocol, address, 50_080) for protocol in (6, 17)
                        for address in ("127.0.0.1", "::1")))


def rules_met(plan: Plan, described: InstanceDescription) -> list[int]:
    """Return for random first packets how many rules each meets."""
    chance, model = random.Random(0), Model(plan)
    nets = {zone.name: zone.nets[0] for zone in described.zones}
    met = []
    for _ in range(PACKETS):
        if chance.random() < 0.8:
            rule = chance.choice(described.rules)
            source, target, port = nets[rule.src_zone[0]], nets[rule.dst_zone[0]], rule.dst_port[0][0]
        else:
            source, target, port = nets["internet"], nets["internet"], chance.randrange(65_536)
        addresses = [net.network + chance.randrange(1 << (32 - net.bits)) for net in (source, target)]
        met.append(model.rule_of(Traffic(int(socket.AF_INET), *addresses, 6, src_port=40_000, dst_port=port))[1])
    return met


def _load_times(kind: str, ports: int) -> dict[str, float]:
    """Return the seconds of loading, in this network namespace."""
    site, described = Site(), description(ports)
    plan = compile_plan([described], site)
    last = dataclasses.replace(described.rules[-1], src_zone=("zone0", "zone1"))
    changed = compile_plan([dataclasses.replace(described, rules=(*described.rules[:-1], last))], site,
                           IndexState.of(plan, IndexState()))
    backend, seconds = Backend(site, RestoreWriter(kind)), {}
    for what, wanted in (("load", plan), ("again", plan), ("one rule", changed)):
        began_s = time.monotonic()
        backend.apply(wanted)
        seconds[f"{what} s"] = round(time.monotonic() - began_s, 2)
    return seconds


def run() -> list[dict]:
    """Return a row per policy and back end."""
    rows = []
    for shape, ports in SHAPES.items():
        described = description(ports)
        began_s = time.process_time()
        plan = compile_plan([described], Site())
        compile_s = time.process_time() - began_s
        met = rules_met(plan, described)
        row = {"policy": f"{ZONES} zones, {RULES} rules, {shape}", "compile s": round(compile_s, 2),
               "packet rules": sum(len(chain.rules) for table in plan.tables for chain in table.chains),
               "met, mean": round(statistics.mean(met), 1), "median": statistics.median(met), "most": max(met),
               "goal": MOST_MET, "met": statistics.median(met) <= MOST_MET}
        for kind in KINDS if os.geteuid() == 0 else ():
            result = subprocess.run(["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh",
                                     sys.executable, "-m", "bench.packetrules", kind, str(ports)],
                                    stdout=subprocess.PIPE, check=True)
            rows.append({"back end": kind} | row | json.loads(result.stdout))
        if os.geteuid() != 0:
            rows.append(row)
    return rows


if __name__ == "__main__":
    print(json.dumps(_load_times(sys.argv[1], int(sys.argv[2]))))
