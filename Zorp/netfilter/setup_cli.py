"""kzorp-setup: packet rules of this host from the policies of its instances.

    kzorp-setup check     what is missing on this host, each with the command that repairs it
    kzorp-setup print     what load would give the kernel; --format plan (default) or commands
    kzorp-setup load      compile and load; the old rules stay when anything fails
    kzorp-setup status    whether the kernel still holds what was loaded last
    kzorp-setup unload    remove everything that load made

Exit status: 0 done, in force; 1 refused, drifted or failed, the reason is on standard error;
2 wrong command line.

While kzorpd runs, it alone writes: load becomes a reload of kzorpd, which takes from the file of an
instance that runs its zones only, and unload is refused, because kzorpd would undo it.

instances.conf says which instances there are, kzorp.yml how this host wants its packet rules.
Policies are loaded by children without rights (Zorp.netfilter.policies).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from Zorp.netfilter import policies, preflight, sessions
from Zorp.netfilter.backend import Backend, BackendError, open_backend
from Zorp.netfilter.compiler import CompileError, IndexState, compile_plan
from Zorp.netfilter.plan import Plan
from Zorp.netfilter.policies import PolicyUnusable
from Zorp.netfilter.render import text_of
from Zorp.netfilter.site import Site, SiteError, read_file
from Zorp.netfilter.store import Entry, State, Store, StoreError
from Zorp.netfilter.tables import TABLES
from Zorp.rules.description import InstanceDescription
from Zorp.transport.kzorpd import KzorpdAway, KzorpdError, ask, socket_path

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
_KZORPD_DEADLINE_S = 300.0


class SetupFailed(Exception):
    """The command cannot be done; `str()` is for the administrator."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        site = preflight.adapted(read_file(options.config_dir))
        return _COMMANDS[options.command](options, site)
    except (SetupFailed, SiteError, CompileError, BackendError, StoreError, PolicyUnusable, KzorpdError) as problem:
        print(f"kzorp-setup: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"kzorp-setup: {problem.filename or options.command}: {problem.strerror}", file=sys.stderr)
    return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kzorp-setup", description="Packet rules of this host from its policies.")
    parser.add_argument("--config-dir", default="/etc/zorp", metavar="DIR",
                        help="where instances.conf and kzorp.yml are (/etc/zorp)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="what this host lacks")
    printing = commands.add_parser("print", help="what load would give the kernel")
    printing.add_argument("--format", choices=("plan", "commands"), default="plan")
    commands.add_parser("load", help="compile the policies and load the result")
    commands.add_parser("status", help="compare the kernel with what was loaded last")
    commands.add_parser("unload", help="remove everything that load made")
    return parser


# ---------------------------------------------------------------------------- commands

def _check(options: argparse.Namespace, site: Site) -> int:
    backend = open_backend(site)
    plan = compile_plan(_descriptions(options), site, Store(site.state_dir).read().indexes)
    found = preflight.findings(site, plan, backend.foreign(), backend.name)
    for finding in found:
        print(finding)
    print(f"back end: {backend.name}; rules: {len(plan.indexes)}; sets: {len(plan.sets)}")
    return EXIT_FAILED if any(finding.is_error for finding in found) else EXIT_OK


def _print(options: argparse.Namespace, site: Site) -> int:
    plan = compile_plan(_descriptions(options), site, Store(site.state_dir).read().indexes)
    print(str(plan) if options.format == "plan" else commands_of(plan), end="")
    return EXIT_OK


def _load(options: argparse.Namespace, site: Site) -> int:
    if site.mode != "compiled":
        raise SetupFailed(f"this host wants no packet rules; mode: {site.mode} in kzorp.yml")
    if _left_to_kzorpd(site):
        print("kzorpd has read the policies again")
        return EXIT_OK
    descriptions = _descriptions(options)
    store, backend = Store(site.state_dir), open_backend(site)
    with store.lock():
        state = store.read()
        plan = compile_plan(descriptions, site, state.indexes)
        _refuse_on_errors(site, plan, backend)
        changed = backend.apply(plan)
        store.write(State(tuple(map(Entry, descriptions)), IndexState.of(plan, state.indexes)))
        ended = 0 if site.keep_sessions or not changed else sessions.end_without_rule(plan, site)
    print(f"{'loaded' if changed else 'unchanged'}; instances: {len(descriptions)}, rules: {len(plan.indexes)}, "
          f"sets: {len(plan.sets)}, back end: {backend.name}, forwarded connections ended: {ended}")
    return EXIT_OK


def _left_to_kzorpd(site: Site) -> bool:
    """Let a running kzorpd do it; False: there is none.  Raises SetupFailed with its reason."""
    try:
        ask(socket_path(site.pid_dir), "reload", _KZORPD_DEADLINE_S)
    except KzorpdAway:
        return False
    except KzorpdError as problem:
        raise SetupFailed(str(problem)) from None
    return True


def _refuse_on_errors(site: Site, plan: Plan, backend: Backend) -> None:
    found = preflight.findings(site, plan, backend.foreign(), backend.name)
    for finding in found:
        print(finding, file=sys.stderr)
    if any(finding.is_error for finding in found):
        raise SetupFailed("nothing was changed")


def _status(options: argparse.Namespace, site: Site) -> int:
    state = Store(site.state_dir).read()
    if not state.entries:
        print("not loaded")
        return EXIT_FAILED
    drift = open_backend(site).drift(compile_plan(state.descriptions, site, state.indexes))
    for text in drift:
        print(text)
    print("drifted; load again" if drift else "in force")
    return EXIT_FAILED if drift else EXIT_OK


def _unload(options: argparse.Namespace, site: Site) -> int:
    with contextlib.suppress(KzorpdAway):
        ask(socket_path(site.pid_dir), "hello", _KZORPD_DEADLINE_S)
        raise SetupFailed("kzorpd runs and would load the rules again; stop it first")
    store, backend = Store(site.state_dir), open_backend(site)
    with store.lock():
        backend.unload()
        store.write(State((), store.read().indexes))
    return EXIT_OK


_COMMANDS = {"check": _check, "print": _print, "load": _load, "status": _status, "unload": _unload}


# ---------------------------------------------------------------------------- parts

def _descriptions(options: argparse.Namespace) -> list[InstanceDescription]:
    """Return the description of every instance; raises PolicyUnusable when one has none."""
    host = policies.read_instances(options.config_dir)
    if host.problems:
        raise SetupFailed("; ".join(host.problems))
    described = policies.describe(host.lines)
    for result in described.values():
        if isinstance(result, PolicyUnusable):
            raise result
    return list(described.values())


def commands_of(plan: Plan) -> str:
    """Return a plan as commands of ipset, ip and iptables-restore, to be read or merged by hand."""
    lines = []
    for members in plan.sets:
        family = "inet6" if members.family == 6 else "inet"
        lines.append(f"ipset create {members.name} hash:net family {family} maxelem "
                     f"{max(65_536, 2 * len(members.members))}")
        lines += [f"ipset add {members.name} {member}" for member in members.members]
    for route in plan.routes:
        lines.append(f"ip -{route.family} route add local default dev lo table {route.table}")
    for rule in plan.ip_rules:
        iface = f" iif {rule.iface}" if rule.iface else ""
        lines.append(f"ip -{rule.family} rule add pref {rule.priority}{iface} fwmark {rule.mark:#x}/{rule.mask:#x} "
                     f"lookup {rule.table}")
    for name in TABLES:
        for table in plan.tables:
            if table.name == name:
                hooks = [f"-I {hook.builtin} -j {hook.chain}" for hook in table.hooks]
                command = "iptables-restore" if table.family == 4 else "ip6tables-restore"
                lines += [f"{command} --noflush <<'END'", text_of(table, add_hooks=hooks) + "END"]
    return "\n".join(lines) + "\n"
