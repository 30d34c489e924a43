"""What a host lacks for packet rules, before they are loaded: each finding with the command that repairs it.

An error stops a load, a warning does not.  Nothing is changed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from Zorp.netfilter import probes
from Zorp.netfilter.caution import lacks_port
from Zorp.netfilter.plan import Hook, Plan, Table
from Zorp.netfilter.render import Present
from Zorp.netfilter.site import Site
from Zorp.netfilter.tables import TableError, read_tables
from Zorp.rules.by_name import Strictness, hanging_on_names
from Zorp.rules.description import DenyData, ForwardData, InstanceDescription

_PROC = pathlib.Path("/proc")
_MARK = re.compile(r"mark(?:s|ed)?\s+(0x[0-9a-f]+|[0-9]+)(?:/(0x[0-9a-f]+|[0-9]+))?")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    is_error: bool
    text: str
    repair: str = ""                 # a command, or what to do

    def __str__(self) -> str:
        kind = "error" if self.is_error else "warning"
        return f"{kind}: {self.text}" + (f"; repair: {self.repair}" if self.repair else "")


def adapted(site: Site) -> Site:
    """Return the settings with what this host's kernel settings imply."""
    return dataclasses.replace(site, accepts_marks=_sysctl("net/ipv4/tcp_fwmark_accept") == "1")


def findings(site: Site, plan: Plan, present: dict[tuple[int, str], Present], backend: str) -> list[Finding]:
    """Return everything that is wrong with this host for this plan, errors first."""
    found = [*_kernel(site, plan), *_routing(site), *_tables(site, present, backend), *_other_tables(site, backend),
             *overtaken(site, plan, present, backend)]
    return sorted(found, key=lambda finding: not finding.is_error)


def overtaken(site: Site, plan: Plan, present: Mapping[tuple[int, str], Present], backend: str) -> list[Finding]:
    """Return what decides about packets before our rules do, on a host that wants our jumps first.

    The rules are the site's and stay; one finding for each built-in chain, about its first such rule.
    """
    if site.hooks != "first":
        return []
    return [finding for table in plan.tables if table.name != "nat"
            and (held := present.get((table.family, table.name))) is not None
            for hook in table.hooks for finding in _before(hook, table, held, backend)]


def _before(hook: Hook, table: Table, held: Present, backend: str) -> Iterator[Finding]:
    lines = held.builtin.get(hook.builtin, ())
    ours = next((at for at, line in enumerate(lines) if line.split()[2:] == ["-j", hook.chain]), 0)
    accepting = _accepting(held.foreign) if ours else set()
    for line in lines[:ours]:
        _, target = _chain_and_target(line)
        if target in accepting or (target == "RETURN" and held.policies.get(hook.builtin) == "ACCEPT"):
            program = f"{'iptables' if table.family == 4 else 'ip6tables'}-{'nft' if backend == 'nft' else 'legacy'}"
            command = f"{program} -t {table.name}"
            yield Finding(False, f"a rule of the site lets packets pass before our rules see them; "
                          f"family='{table.family}', table='{table.name}', rule='{line}'",
                          f"{command} -I {hook.builtin} -j {hook.chain} && {command} -D {hook.builtin} {ours + 2}; "
                          "or set hooks: last in kzorp.yml if it shall be so")
            return


def _accepting(lines: Iterable[str]) -> set[str]:
    """Return the targets that may let a packet pass: the chains of the site that come to such a target, too."""
    found, before = {"ACCEPT", "QUEUE", "NFQUEUE"}, 0
    while len(found) > before:
        before = len(found)
        found |= {chain for chain, target in map(_chain_and_target, lines) if target in found}
    return found


def _chain_and_target(line: str) -> tuple[str, str]:
    """Return the chain of a rule as iptables-save shows it, and what the rule leads to; empty: nowhere."""
    words = line.split()
    at = next((at for at, word in enumerate(words) if word in ("-j", "-g", "--jump", "--goto")), len(words))
    return words[1], words[at + 1] if at + 1 < len(words) else ""


def named_findings(descriptions: Iterable[InstanceDescription]) -> list[Finding]:
    """Return which rules refuse by host names what others let pass as long as a name has no address."""
    return [
        Finding(False, f"instance '{description.instance}', rule {hanging.rule.rule_id} (service "
                f"'{hanging.rule.service}') restricts zone '{hanging.zone}' by host name; while {hanging.hostname} has "
                f"no known address, rule {hanging.broader.rule_id} (service '{hanging.broader.service}') takes its "
                "connections", "give the zone the addresses, too, or permit by host name and let nothing else pass")
        for description in descriptions
        for hanging in hanging_on_names(description.rules, _strictness(description), description.zones)]


def port_findings(descriptions: Iterable[InstanceDescription]) -> list[Finding]:
    """Return which instances have proxies whose ports are not known yet."""
    return [Finding(False, f"instance '{description.instance}' has never run: packets for its proxies are dropped "
                    "until it starts and its rules are loaded again, as kzorpd does",
                    f"zorpctl start {description.instance}, and kzorp-setup load where no kzorpd runs; "
                    "config.options.rule_listen_port in the policy fixes the port beforehand")
            for description in descriptions if lacks_port(description)]


def _strictness(description: InstanceDescription) -> dict[str, Strictness]:
    return {service.name: Strictness.REFUSED if isinstance(service, DenyData) else
            Strictness.FORWARDED if isinstance(service, ForwardData) else Strictness.PROXIED
            for service in description.services}


def kernel_findings(plan: Plan, backend: str) -> list[Finding]:
    """Return what this kernel cannot do of a plan, tried out where it changes nothing; for user 0."""
    try:
        lacking = probes.missing(plan, "nft" if backend == "nft" else "legacy")
    except probes.ProbesImpossible as problem:
        return [Finding(False, f"what the kernel can do was not tried out: {problem}", "run kzorp-setup as root")]
    found: dict[str, Finding] = {}
    for one in lacking:
        compat = " nft_compat" if backend == "nft" and one.what != probes.SETS else ""
        found.setdefault(one.module, Finding(
            True, f"the kernel refuses {one.what} for IPv{one.family}: {one.complaint}",
            f"modprobe -a {one.module}{compat}"))
    return list(found.values())


def _sysctl(name: str) -> str | None:
    try:
        return (_PROC / "sys" / name).read_text().strip()
    except OSError:
        return None


def _kernel(site: Site, plan: Plan) -> Iterator[Finding]:
    if _sysctl("net/netfilter/nf_conntrack_max") is None:
        yield Finding(True, "connection tracking is not there", "modprobe nf_conntrack")
    if any(rule.kind == "forward" for rule in plan.indexes):
        for family, name in ((4, "net.ipv4.ip_forward"), (6, "net.ipv6.conf.all.forwarding")):
            if family in site.families and _sysctl(name.replace(".", "/")) != "1":
                is_needed = any(rule.kind == "forward" and _uses(plan, family, rule.index) for rule in plan.indexes)
                yield Finding(is_needed and family == 4, f"the host does not forward packets, but the policy has a "
                              f"PFService; sysctl='{name}'", f"sysctl -w {name}=1")
    if 6 in site.families and _sysctl("net/ipv6/conf/all/disable_ipv6") is None:
        yield Finding(True, "this kernel has no IPv6", "set families: [4] in kzorp.yml")


def _uses(plan: Plan, family: int, index: int) -> bool:
    """Return whether packets of a family can reach a rule."""
    action = f"ZORP_R{index}"
    return any(action in rule.target.values for chain in plan.table(family, "mangle").chains for rule in chain.rules)


def _routing(site: Site) -> Iterator[Finding]:
    if site.accepts_marks:
        yield Finding(False, "accepted sockets inherit the mark of diverted packets, so replies would be routed to "
                      "this host; a routing rule that prevents this is loaded with the packet rules",
                      "sysctl -w net.ipv4.tcp_fwmark_accept=0, and load again")
    names = sorted(path.parent.name for path in _PROC.glob("sys/net/ipv4/conf/*/rp_filter"))
    strict = [name for name in names if name not in ("all", "default", "lo")
              and _sysctl(f"net/ipv4/conf/{name}/rp_filter") == "1"]     # an interface may go meanwhile
    if strict and 4 in site.families:
        yield Finding(False, "packets on asymmetric routes are dropped without a line; strict interfaces: "
                      + " ".join(strict),
                      " && ".join(f"sysctl -w net.ipv4.conf.{name}.rp_filter=2" for name in strict))


def _tables(site: Site, present: dict[tuple[int, str], Present], backend: str) -> Iterator[Finding]:
    for (family, name), held in sorted(present.items()):
        if name == "filter" and held.policies.get("INPUT") == "ACCEPT":
            command = "iptables" if family == 4 else "ip6tables"
            yield Finding(False, f"{command}: what no rule takes may reach this host itself, the policy of INPUT is "
                          "ACCEPT", f"{command} -P INPUT DROP, after rules for what the host needs")
        yield from _foreign_marks(site, family, name, held)
    if backend == "nft" and (names := _lines(_PROC / "net/ip_tables_names")):
        yield Finding(False, f"the legacy tables are in use beside the ones we write; tables: {' '.join(names)}",
                      "move their rules, or set backend: legacy-restore in kzorp.yml")


def _other_tables(site: Site, backend: str) -> Iterator[Finding]:
    """Yield a finding when the other kind of tables holds our chains: every packet would meet both."""
    other = "legacy" if backend == "nft" else "nft"
    for family, names in ((4, "net/ip_tables_names"), (6, "net/ip6_tables_names")):
        if family not in site.families or (other == "legacy" and not _lines(_PROC / names)):
            continue                                     # reading them would load the modules of the legacy tables
        with contextlib.suppress(TableError):            # that kind of iptables is not there
            if any(held.ours for held in read_tables(family, other).values()):
                setting = "nft" if other == "nft" else "legacy-restore"
                yield Finding(True, f"the {other} tables hold packet rules of ours from before the back end changed; "
                              f"family='{family}'", f"set backend: {setting} in kzorp.yml, run kzorp-setup unload, "
                              "and set it back")


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _foreign_marks(site: Site, family: int, name: str, held: Present) -> Iterator[Finding]:
    ours = site.marks.divert | site.marks.own
    for line in (*held.foreign, *(line for lines in held.builtin.values() for line in lines)):
        bits = site.marks.connection_mask if "connmark" in line.lower() else ours
        for value, mask in _MARK.findall(line.lower()):
            if (int(mask, 0) if mask else int(value, 0)) & bits:
                yield Finding(False, f"a rule of the site uses mark bits of ours; family='{family}', table='{name}', "
                              f"rule='{line}'", "choose other bits under marks: in kzorp.yml")
                break
