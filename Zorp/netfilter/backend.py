"""A plan into the kernel, and the kernel compared with a plan.

Theory of operation
    apply() works from what is harmless to what decides: new sets and routing, which are read back;
    then the tables nat, filter and mangle, mangle last, because it makes the marks that the others
    read; where filter lets unmarked packets pass (default_deny: false), filter comes last, so that
    nobody passes because nothing marks him yet.  Every table is tried before the first is changed,
    and read back after the last.  When a step fails all the same, or something else is read than
    was written, the tables that were changed get their old chains back, sets their old members,
    and BackendError says what happened: the old rules stay in force.

    Then the new rules are in force, and what only the old ones used goes: sets and routing.  What
    cannot be removed (a rule of the site uses a set of ours) is reported and tried again by
    the next load that finds it unused; it never makes a load fail.

    A plan that the kernel holds already changes nothing, not even for a moment.

    unload() takes out our jumps and chains, mangle first, then sets and routing.

    guard() is for a kernel that holds nothing of ours yet: it writes one chain per family that
    forwards nothing, and needs the table filter for that and nothing else of the kernel.  apply()
    replaces it like any other chain of ours.

    Both families are read always: what a family holds of ours that the site uses no longer is
    cleared away, after the tables of the others.

Deviation from kzorp.md 9.5 and 9.13
    The text there swaps the members of sets first, then loads the rules, and takes either state
    between for valid.  It is not: the old rules with the new zones are a policy that nobody
    wrote, and nets that move from one zone to another get past their proxy for as long as the
    tables take, or for good when the load is killed there.  So the sets of a changed policy have
    names of their own (Zorp.netfilter.zonesets), stand beside the old ones, and the switch of the
    tables is the switch of both.

Which writer is used: the kind of the command iptables, unless the site says otherwise.
python-iptables (backend: legacy) is for hosts that ask for it; Zorp.netfilter.tables says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from Zorp.Log import log
from Zorp.netfilter.actions import DROP, FORWARD_CHAIN
from Zorp.netfilter.ipsets import TEMPORARY, SetError, Sets
from Zorp.netfilter.plan import Chain, Hook, Plan, Rule, Table
from Zorp.netfilter.render import Present, expected
from Zorp.netfilter.routing import Routing, RoutingError
from Zorp.netfilter.site import Site
from Zorp.netfilter.tables import (
    TABLES,
    Change,
    LegacyWriter,
    RestoreWriter,
    TableError,
    Writer,
    change_to,
    hooks_of,
    loading_order,
    run,
    undo,
)
from Zorp.process import capabilities

_FAMILIES = (4, 6)
_EMPTY = Plan(tables=(), sets=(), ip_rules=(), routes=(), indexes=())


class BackendError(Exception):
    """The kernel could not be given a plan, or be read; `str()` is for the administrator."""


def open_backend(site: Site) -> Backend:
    """Return the back end that fits this host and its settings; raises BackendError."""
    if not capabilities.permitted() >> capabilities.CAP_NET_ADMIN & 1:
        raise BackendError("packet rules need the capability CAP_NET_ADMIN; run this as root")
    try:
        return Backend(site, _writer(site))
    except TableError as problem:
        raise BackendError(str(problem)) from None


def _writer(site: Site) -> Writer:
    kind = site.backend
    if kind == "auto":
        kind = "nft" if "nf_tables" in run(["iptables", "--version"], "iptables") else "legacy-restore"
    return LegacyWriter() if kind == "legacy" else RestoreWriter(kind.removesuffix("-restore"))


class Backend:
    """The packet filter, sets and routing of this network namespace.  One thread only."""

    def __init__(self, site: Site, writer: Writer) -> None:
        self._site, self._writer = site, writer

    @property
    def name(self) -> str:
        """The writer in use: nft, legacy or legacy-restore."""
        return self._writer.name

    # ---- changing

    def apply(self, plan: Plan) -> bool:
        """Give the kernel a plan; return whether anything changed.  Raises BackendError, the old state stays."""
        with self._errors():
            self._writer.check(plan)
            present = self._read()
            if not (self._tables_drift(plan, present) or self._other_drift(plan)):
                return False
            with Sets() as sets, Routing() as routing:
                sets.load(plan.sets)
                try:
                    routing.load(plan.ip_rules, plan.routes, self._site)
                    if missing := [*_missing_sets(plan, sets), *self._missing_routing(plan, routing)]:
                        raise SetError(_not_as_given(missing))
                    self._write_tables(plan, present)
                except Exception:                        # a defect, too, leaves the old state
                    sets.undo()
                    raise
                self._remove_others(plan, sets, routing)
            return True

    def _remove_others(self, plan: Plan, sets: Sets, routing: Routing) -> None:
        """Remove what the plan does not want beside the tables; report what stays."""
        try:
            for problem in sets.finish(keep=[members.name for members in plan.sets]):
                log(None, "core.error", 2, "Old address set stays; error='%s'",
                    (problem,))
            routing.remove_others(plan.ip_rules, plan.routes, self._site)
        except (SetError, RoutingError) as problem:
            log(None, "core.error", 2, "Old address sets or routing rules stay; error='%s'", (problem,))

    def guard(self) -> bool:
        """Forward nothing where rules of ours do not decide about it already; return whether anything changed.

        Raises BackendError when a family is without such rules; the other one has them all the same.
        """
        changed, problems = False, []
        for family in self._site.families:
            hooks = () if self._site.hooks == "none" else (Hook("FORWARD", FORWARD_CHAIN),)
            table = Table(family, "filter", (Chain(FORWARD_CHAIN, (Rule((), DROP),)),), hooks)
            try:
                held = self._writer.read(family).get(table.name)
                jumps = hooks_of(held)
                if held is None or FORWARD_CHAIN not in held.ours or any(
                        (hook.builtin, hook.chain) not in jumps for hook in hooks):
                    self._writer.write(change_to(table, held, self._site.hooks))
                    changed = True
            except TableError as problem:
                problems.append(str(problem))
        if problems:
            raise BackendError("; ".join(problems))
        return changed

    def update_sets(self, plan: Plan) -> bool:
        """Give the kernel the members of the plan's sets and nothing else; return whether anything changed."""
        with self._errors(), Sets() as sets:
            changed = sets.load(plan.sets)
            sets.finish()
            return changed

    def unload(self) -> None:
        """Remove everything of ours.  Raises BackendError."""
        with self._errors():
            present = self._read()
            for table in _unwanted(_EMPTY, present):
                self._writer.write(change_to(table, present[table.family, table.name], "none"))
            with Sets() as sets, Routing() as routing:
                self._remove_others(_EMPTY, sets, routing)

    def _write_tables(self, plan: Plan, present: dict[tuple[int, str], Present]) -> None:
        order = loading_order(default_deny=self._site.default_deny)
        wanted = sorted(plan.tables, key=lambda table: order.index(table.name))
        changes = [change_to(table, present.get((table.family, table.name)), self._site.hooks)
                   for table in (*wanted, *_unwanted(plan, present))]
        changes = [change for change in changes if change]
        for change in changes:
            self._writer.test(change)
        done: list[Change] = []
        try:
            for change in changes:
                self._writer.write(change)
                done.append(change)
            if left := self._tables_drift(plan, self._read()):
                raise TableError(_not_as_given(left))
        except Exception as problem:
            stuck = [why for change in reversed(done)
                     if (why := self._put_back(change, present.get((change.table.family, change.table.name))))]
            if stuck:
                raise TableError("; ".join(map(str, (problem, *stuck)))) from problem
            raise

    def _put_back(self, change: Change, before: Present | None) -> str:
        """Restore what a table held; return why that cannot be done, empty: it is done."""
        try:
            undo(change, before, "nft" if self._writer.name == "nft" else "legacy")
        except TableError as problem:
            return str(problem)
        return ""

    # ---- reading

    def _read(self) -> dict[tuple[int, str], Present]:
        found = {}
        for family in _FAMILIES:
            # a host without a family needs no iptables for it
            with contextlib.nullcontext() if family in self._site.families else contextlib.suppress(TableError):
                found.update({(family, name): held for name, held in self._writer.read(family).items()})
        return found

    def drift(self, plan: Plan) -> list[str]:
        """Return what of the kernel's state is not as planned, a text each; none: it holds the plan."""
        return self.survey(plan)[0]

    def is_unloaded(self) -> bool:
        """Return whether the kernel holds nothing of ours."""
        return not self.drift(_EMPTY)

    def survey(self, plan: Plan) -> tuple[list[str], dict[tuple[int, str], Present]]:
        """Return what drift() and foreign() say, from one reading."""
        with self._errors():
            present = self._read()
            return self._tables_drift(plan, present) + self._other_drift(plan), self._of_families(present)

    def _tables_drift(self, plan: Plan, present: dict[tuple[int, str], Present]) -> list[str]:
        return [text for table in (*plan.tables, *_unwanted(plan, present))
                for text in self._table_drift(table, present)]

    def _other_drift(self, plan: Plan) -> list[str]:
        with Sets() as sets, Routing() as routing:
            return [*_missing_sets(plan, sets), *_unused_sets(plan, sets), *self._missing_routing(plan, routing)]

    def _missing_routing(self, plan: Plan, routing: Routing) -> list[str]:
        routes, rules = routing.routes(self._site), routing.rules(self._site)
        return [*(f"missing: {route}" for route in plan.routes if route not in routes),
                *(f"missing: {rule}" for rule in plan.ip_rules if rule not in rules)]

    def _table_drift(self, table: Table, present: dict[tuple[int, str], Present]) -> Iterator[str]:
        where = f"{'iptables' if table.family == 4 else 'ip6tables'} table {table.name}"
        held = present.get((table.family, table.name))
        ours = held.ours if held is not None else {}
        wanted = expected(table.chains, table.family)
        for name in sorted(wanted.keys() | ours.keys()):
            if name not in ours:
                yield f"{where}: chain {name} is missing"
            elif name not in wanted:
                yield f"{where}: chain {name} is left over"
            elif ours[name] != wanted[name]:
                yield f"{where}: chain {name} has other rules"
        jumps = hooks_of(held)
        if not table.chains and jumps:
            yield f"{where}: jumps to chains of ours are left over"
        for hook in table.hooks:
            if jumps.count((hook.builtin, hook.chain)) != 1:
                yield f"{where}: {hook.builtin} does not jump to {hook.chain} once"

    def foreign(self) -> dict[tuple[int, str], Present]:
        """Return what the tables of the families in use hold, ours and others', for the preflight checks."""
        with self._errors():
            return self._of_families(self._read())

    def _of_families(self, present: dict[tuple[int, str], Present]) -> dict[tuple[int, str], Present]:
        return {key: held for key, held in present.items() if key[0] in self._site.families}

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (TableError, SetError, RoutingError) as problem:
            raise BackendError(str(problem)) from None


def _not_as_given(left: list[str]) -> str:
    return f"the kernel does not hold what it was given: {'; '.join(left[:3])}"


def _unwanted(plan: Plan, present: dict[tuple[int, str], Present]) -> list[Table]:
    """Return, without chains and in the order of removal, the tables that hold something of ours and no plan."""
    planned = {(table.family, table.name) for table in plan.tables}
    return [Table(family, name, (), ()) for name in reversed(TABLES) for family in _FAMILIES
            if (family, name) not in planned and (held := present.get((family, name))) is not None
            and (held.ours or hooks_of(held))]


def _missing_sets(plan: Plan, sets: Sets) -> Iterator[str]:
    present = sets.read()
    for members in plan.sets:
        if members.name not in present:
            yield f"set {members.name} is missing"
        elif frozenset(present[members.name].members) != frozenset(members.members):
            yield f"set {members.name} has other members"


def _unused_sets(plan: Plan, sets: Sets) -> Iterator[str]:
    """Yield a text per set that no plan and no rule has; one that a rule of the site uses has to stay."""
    wanted = {members.name for members in plan.sets}
    if others := [name for name in sets.names() if name not in wanted and not name.startswith(TEMPORARY)]:
        used = sets.used()
        yield from (f"set {name} is left over" for name in others if name not in used)
