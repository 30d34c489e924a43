"""kzorp-setup: packet rules of this host from the policies of its instances.

    kzorp-setup check     what is missing on this host, each with the command that repairs it
    kzorp-setup print     what load would give the kernel; --format plan (default) or commands
    kzorp-setup load      compile and load; the old rules stay when anything fails
    kzorp-setup status    whether the kernel still holds what was loaded last
    kzorp-setup unload    remove everything that load made
    kzorp-setup boot      load; when that fails, what was in force last; failing that too, forward nothing
    kzorp-setup guard     forward nothing unless packet rules of ours are there: how boot begins

Exit status: 0 done, in force; 1 refused, drifted or failed, the reason is on standard error;
2 wrong command line.

boot is for a kernel without any rule of ours, which would forward what belongs to a proxy.  So its
first step, before any policy is looked at, is to forward nothing (guard): whoever is killed then, for
want of memory or by hand, leaves a closed host.  And it leaves no way out, whatever exception a step
ends with: the rules in force last are one consistent whole (parts of them beside new parts might let
one instance forward what another one's proxy was to see), and without these no packet is forwarded.
It ends with 1 then, so that the failure shows.

While kzorpd runs, it alone writes: load becomes a reload of kzorpd, which takes from the file of an
instance that runs its zones only, and unload is refused, because kzorpd would undo it.  Whether it
runs is said by the lock on its pid file, so one that does not answer is not taken for absent.

Host names of zones have the addresses that kzorpd knew last (Zorp.netfilter.known_addresses), so
that what it refused by name stays refused until it runs again; nothing is looked up here.

instances.conf says which instances there are, kzorp.yml how this host wants its packet rules.
Policies are loaded by children without rights (Zorp.netfilter.policies).  Which ports the proxies
of an instance have is known once it has run, or by its policy: until then their packets are dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence

from pyroute2.netlink.exceptions import NetlinkError

from Zorp.netfilter import policies, preflight, sessions
from Zorp.netfilter.backend import Backend, BackendError, open_backend
from Zorp.netfilter.caution import until_it_runs
from Zorp.netfilter.compiler import CompileError, IndexState, compile_plan
from Zorp.netfilter.evaluator import Evaluator
from Zorp.netfilter.instance_zones import Zoned, described, zoned
from Zorp.netfilter.known_addresses import KnownAddresses
from Zorp.netfilter.own_files import running_kzorpd
from Zorp.netfilter.plan import Plan, RuleIndex
from Zorp.netfilter.policies import PolicyUnusable
from Zorp.netfilter.render import text_of
from Zorp.netfilter.site import Site, SiteError, read_file
from Zorp.netfilter.store import Entry, State, Store, StoreError
from Zorp.netfilter.tables import loading_order
from Zorp.rules.description import InstanceDescription
from Zorp.transport.kzorpd import KzorpdAway, KzorpdError, ask, socket_path

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
_KZORPD_DEADLINE_S = 300.0


class SetupFailed(Exception):
    """The command cannot be done; `str()` is for the administrator."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")        # names of zones may have what a terminal has not
    options = _parser().parse_args(arguments)
    return _boot(options) if options.command == "boot" else _attempt(_COMMANDS[options.command], options)


def _attempt(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Return the exit status of a command; why it cannot be done goes to standard error."""
    try:
        return command(options)
    except (SetupFailed, SiteError, CompileError, BackendError, StoreError, KzorpdError) as problem:
        print(f"kzorp-setup: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"kzorp-setup: {problem.filename or options.command}: {problem.strerror}", file=sys.stderr)
    return EXIT_FAILED


def _site(options: argparse.Namespace) -> Site:
    return preflight.adapted(read_file(options.config_dir))


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
    commands.add_parser("boot", help="load; else what was in force last; else forward nothing")
    commands.add_parser("guard", help="forward nothing unless packet rules are there")
    return parser


# ---------------------------------------------------------------------------- commands

def _check(options: argparse.Namespace) -> int:
    site = _site(options)
    backend = open_backend(site)
    descriptions, problems = _policies(options)
    try:
        plan = _plan(site, map(until_it_runs, descriptions), Store(site.state_dir).read().indexes)
    except CompileError as problem:                  # what the host lacks is to be said all the same
        problems.append(str(problem))
        plan = compile_plan((), site)
    found = [*(preflight.Finding(True, problem) for problem in problems), *preflight.port_findings(descriptions),
             *preflight.named_findings(descriptions), *preflight.kernel_findings(plan, backend.name),
             *preflight.findings(site, plan, backend.foreign(), backend.name)]
    if not (descriptions or problems):
        found.append(preflight.Finding(
            False, "there is no instance", f"name one in {options.config_dir}/instances.conf"))
    for finding in found:
        print(finding)
    print(f"back end: {backend.name}; rules: {len(plan.indexes)}; sets: {len(plan.sets)}")
    return EXIT_FAILED if any(finding.is_error for finding in found) else EXIT_OK


def _print(options: argparse.Namespace) -> int:
    site = _site(options)
    plan = _plan(site, _descriptions(options), Store(site.state_dir).read().indexes)
    print(str(plan) if options.format == "plan" else commands_of(plan, site), end="")
    return EXIT_OK


def _load(options: argparse.Namespace) -> int:
    site = _site(options)
    if site.mode != "compiled":
        raise SetupFailed(f"this host wants no packet rules; mode: {site.mode} in kzorp.yml")
    if _left_to_kzorpd(site):
        print("kzorpd has read the policies again")
        return EXIT_OK
    return _put_in_force(site, tuple(map(Entry, _descriptions(options))))


def _put_in_force(site: Site, entries: tuple[Entry, ...]) -> int:
    store, backend = Store(site.state_dir), open_backend(site)
    with store.lock():
        before = store.read()
        state = State(entries, before.indexes)
        addresses = KnownAddresses(site.state_dir).read()
        instances = zoned(state.descriptions, addresses)
        plan = compile_plan(described(instances), site, state.indexes)
        _refuse_on_errors(site, plan, backend, state.descriptions)
        after = State(entries, IndexState.of(plan, state.indexes))
        try:
            with store.replacing(before, after):
                changed = backend.apply(plan)
        except BackendError as problem:                  # what began meanwhile need not be permitted by the old rules
            if before.entries:
                try:
                    _settle_sessions(site, store, before, before, zoned(before.descriptions, addresses))
                except SetupFailed as more:
                    raise SetupFailed(f"{problem}; what was in force stays; {more}") from None
            raise
        if not changed and before.is_settled:
            store.write(dataclasses.replace(after, is_settled=True))
        ended = _settle_sessions(site, store, before, after, instances)
    print(f"{'loaded' if changed else 'unchanged'}; instances: {len(entries)}, rules: {len(plan.indexes)}, "
          f"sets: {len(plan.sets)}, back end: {backend.name}, forwarded connections ended: {ended}")
    return EXIT_OK


def _settle_sessions(site: Site, store: Store, before: State, after: State, instances: list[Zoned]) -> int:
    """Decide about forwarded connections unless that was done under this state; return how many ended."""
    try:
        if site.keep_sessions or store.read().is_settled:
            sessions.begin_anew(site)
            return 0
        former: tuple[RuleIndex, ...] = ()
        with contextlib.suppress(CompileError):      # kzorp.yml may have changed, too
            former = compile_plan(before.descriptions, site, before.indexes).indexes
        evaluator = Evaluator(instances)
        rules = compile_plan(after.descriptions, site, after.indexes).indexes
        ended = sessions.settle(site, former, rules, after.descriptions, evaluator).ended
    except (OSError, NetlinkError) as problem:
        raise SetupFailed("the rules are in force, but connections that they do not permit cannot be ended; "
                          f"load again; error='{problem}'") from None
    store.write(dataclasses.replace(after, is_settled=True))
    return ended


def _left_to_kzorpd(site: Site) -> bool:
    """Let a running kzorpd do it; False: there is none.  Raises SetupFailed with its reason."""
    try:
        ask(socket_path(site.pid_dir), "reload", _KZORPD_DEADLINE_S)
    except KzorpdAway as problem:
        _refuse_beside_silent_kzorpd(site, problem)
        return False
    except KzorpdError as problem:
        raise SetupFailed(str(problem)) from None
    return True


def _refuse_beside_silent_kzorpd(site: Site, problem: KzorpdAway) -> None:
    """Raises SetupFailed when a kzorpd runs that does not answer: it would undo what is done beside it."""
    with contextlib.suppress(FileNotFoundError):
        if pid := running_kzorpd(site.state_dir):
            raise SetupFailed(f"kzorpd runs (pid {pid}), and would undo this; stop it or start it anew; {problem}")


def _refuse_on_errors(site: Site, plan: Plan, backend: Backend, descriptions: Iterable[InstanceDescription]) -> None:
    found = [*preflight.findings(site, plan, backend.foreign(), backend.name),
             *preflight.named_findings(descriptions)]
    for finding in found:
        print(finding, file=sys.stderr)
    if any(finding.is_error for finding in found):
        raise SetupFailed("nothing was changed")


def _status(options: argparse.Namespace) -> int:
    site = _site(options)
    state, backend = Store(site.state_dir).read(), open_backend(site)
    if not state.entries and backend.is_unloaded():
        print("not loaded")
        return EXIT_FAILED
    plan = _plan(site, state.descriptions, state.indexes)
    drift, present = backend.survey(plan)
    for text in (*drift, *preflight.overtaken(site, plan, present, backend.name)):
        print(text)
    if not (state.is_settled or state.entries or drift):
        print("closed: nothing is forwarded until packet rules are loaded")
        return EXIT_FAILED
    is_due = not (state.is_settled or site.keep_sessions)
    if is_due:
        print("a load did not end: forwarded connections may live that these rules do not permit")
    print("drifted; load again" if drift else "in force, but not for all connections; load again" if is_due
          else "in force")
    return EXIT_FAILED if drift or is_due else EXIT_OK


def _unload(options: argparse.Namespace) -> int:
    site = _site(options)
    _refuse_beside_kzorpd(site)
    store, backend = Store(site.state_dir), open_backend(site)
    with store.lock():
        before = store.read()
        with store.replacing(before, State((), before.indexes)):
            backend.unload()
    return EXIT_OK


def _refuse_beside_kzorpd(site: Site) -> None:
    try:
        ask(socket_path(site.pid_dir), "hello", _KZORPD_DEADLINE_S)
    except KzorpdAway as problem:
        _refuse_beside_silent_kzorpd(site, problem)
        return
    raise SetupFailed("kzorpd runs, and what it has loaded stays; stop it first")


# ---------------------------------------------------------------------------- the start of the host

def _boot(options: argparse.Namespace) -> int:
    """Put in force the best that can be had."""
    if not _wants_rules(options):
        print("this host wants no packet rules")
        return EXIT_OK
    _survive(_guard, options)
    if _survive(_load, options) == EXIT_OK:
        return EXIT_OK
    if _survive(_load_stored, options) != EXIT_OK:
        _survive(_close, options)
    return EXIT_FAILED


def _wants_rules(options: argparse.Namespace) -> bool:
    """Return False when this host surely wants no packet rules."""
    with contextlib.suppress(Exception):             # said by _load, which meets the same
        return _site(options).mode == "compiled"
    return True


def _survive(step: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Return the exit status of a step of boot.

    Whatever goes wrong is a failure of this step only: until the next one has ended the host is open.
    """
    try:
        return _attempt(step, options)
    except Exception as problem:
        print(f"kzorp-setup: {options.command}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return EXIT_FAILED


def _load_stored(options: argparse.Namespace) -> int:
    """Load what was in force last."""
    site = _site(options)
    _refuse_beside_kzorpd(site)
    entries = Store(site.state_dir).read().entries
    if not entries:
        raise SetupFailed(f"no packet rules are stored in {site.state_dir}")
    return _put_in_force(site, entries)


def _guard(options: argparse.Namespace) -> int:
    """Forward nothing unless packet rules are there.  The stored state stays as it is."""
    if not _wants_rules(options):
        return EXIT_OK
    with contextlib.suppress(SetupFailed):           # kzorpd runs, and knows what is to be there
        return _closed_by(_apply_guard, options)
    return EXIT_OK


def _close(options: argparse.Namespace) -> int:
    """Forward nothing, whatever the site says.  The stored state stays as it is."""
    if _closed_by(_apply_closed, options) != EXIT_OK:
        return EXIT_FAILED
    print("closed: nothing is forwarded until packet rules can be loaded")
    return EXIT_OK


def _closed_by(step: Callable[[Site, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Take this step with the settings of the host, else with the defaults; return the exit status.

    Raises SetupFailed when kzorpd runs.
    """
    sites = [preflight.adapted(Site())]
    with contextlib.suppress(Exception):             # said before, by _load
        sites.insert(0, _site(options))
    with contextlib.suppress(KzorpdError, OSError):  # what does not speak like kzorpd keeps no rules, nor does any
        _refuse_beside_kzorpd(sites[0])              # run where somebody else may write its state
    is_done = any(_survive(functools.partial(step, site), options) == EXIT_OK for site in sites)
    return EXIT_OK if is_done else EXIT_FAILED


def _apply_guard(site: Site, options: argparse.Namespace) -> int:
    open_backend(site).guard()
    return EXIT_OK


def _apply_closed(site: Site, options: argparse.Namespace) -> int:
    open_backend(site).apply(compile_plan((), dataclasses.replace(site, default_deny=True)))
    return EXIT_OK


_COMMANDS = {"check": _check, "print": _print, "load": _load, "status": _status, "unload": _unload, "guard": _guard}


# ---------------------------------------------------------------------------- parts

def _plan(site: Site, descriptions: Iterable[InstanceDescription], indexes: IndexState) -> Plan:
    """Return the plan for these, with the addresses that host names had last."""
    instances = zoned(descriptions, KnownAddresses(site.state_dir).read())
    return compile_plan(described(instances), site, indexes)


def _policies(options: argparse.Namespace) -> tuple[list[InstanceDescription], list[str]]:
    """Return the descriptions that can be had, and why others cannot."""
    try:
        host = policies.read_instances(options.config_dir)
    except OSError as problem:
        return [], [f"{problem.filename}: {problem.strerror}"]
    found = policies.describe(host.lines).values()
    return ([one for one in found if isinstance(one, InstanceDescription)],
            [*host.problems, *(str(one) for one in found if isinstance(one, PolicyUnusable))])


def _descriptions(options: argparse.Namespace) -> list[InstanceDescription]:
    """Return what may come into force of every instance, its doubts said; raises SetupFailed when one has none."""
    descriptions, problems = _policies(options)
    if problems:
        raise SetupFailed("; ".join(problems))
    for finding in preflight.port_findings(descriptions):
        print(finding, file=sys.stderr)
    return list(map(until_it_runs, descriptions))


def commands_of(plan: Plan, site: Site) -> str:
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
    for name in loading_order(default_deny=site.default_deny):
        for table in plan.tables:
            if table.name == name:
                hooks = [f"-I {hook.builtin} -j {hook.chain}" for hook in table.hooks]
                command = "iptables-restore" if table.family == 4 else "ip6tables-restore"
                lines += [f"{command} --noflush <<'END'", text_of(table, add_hooks=hooks) + "END"]
    return "\n".join(lines) + "\n"
