"""A plan into the kernel, and the kernel compared with a plan.

Theory of operation
    apply() works from what is harmless to what decides: sets, routing, then the tables nat,
    filter and mangle, mangle last, because it makes the marks that the others read.  Every table
    is tried before the first is changed, and read back after the last.  When a step fails all the
    same, or something else is read than was written, the tables that were changed get their old
    chains back, sets their old members, and BackendError says what happened: the old rules stay
    in force.

    A plan that the kernel holds already changes nothing, not even for a moment.

    unload() takes out our jumps and chains, mangle first, then sets and routing.

Which writer is used: the kind of the command iptables, unless the site says otherwise.
python-iptables (backend: legacy) is for hosts that ask for it; Zorp.netfilter.tables says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from Zorp.netfilter.ipsets import SetError, Sets
from Zorp.netfilter.plan import Plan, Table
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
    run,
    undo,
)


class BackendError(Exception):
    """The kernel could not be given a plan, or be read; `str()` is for the administrator."""


def open_backend(site: Site) -> Backend:
    """Return the back end that fits this host and its settings; raises BackendError."""
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
                    self._write_tables(plan, present)
                except (TableError, RoutingError):
                    sets.undo()
                    raise
                sets.finish(keep=[members.name for members in plan.sets])
            if left := self._other_drift(plan):
                raise BackendError(_not_as_given(left))
            return True

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
            for name in reversed(TABLES):
                for family in self._site.families:
                    held = present.get((family, name))
                    if held is not None and (held.ours or hooks_of(held)):
                        self._writer.write(change_to(Table(family, name, (), ()), held, "none"))
            with Sets() as sets:
                sets.finish(keep=())
            with Routing() as routing:
                routing.unload(self._site)

    def _write_tables(self, plan: Plan, present: dict[tuple[int, str], Present]) -> None:
        changes = [change_to(table, present.get((table.family, table.name)), self._site.hooks)
                   for name in TABLES for table in plan.tables if table.name == name]
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
        except TableError:
            for change in reversed(done):
                self._put_back(change, present.get((change.table.family, change.table.name)))
            raise

    def _put_back(self, change: Change, before: Present | None) -> None:
        """Restore what a table held; goes on with the next table when even that is refused."""
        with contextlib.suppress(TableError):
            undo(change, before, "nft" if self._writer.name == "nft" else "legacy")

    # ---- reading

    def _read(self) -> dict[tuple[int, str], Present]:
        return {(family, name): held for family in self._site.families
                for name, held in self._writer.read(family).items()}

    def drift(self, plan: Plan) -> list[str]:
        """Return what of the kernel's state is not as planned, a text each; none: it holds the plan."""
        with self._errors():
            return self._drift(plan)

    def _drift(self, plan: Plan) -> list[str]:
        return self._tables_drift(plan, self._read()) + self._other_drift(plan)

    def _tables_drift(self, plan: Plan, present: dict[tuple[int, str], Present]) -> list[str]:
        return [text for table in plan.tables for text in self._table_drift(table, present)]

    def _other_drift(self, plan: Plan) -> list[str]:
        with Sets() as sets:
            found = list(_set_drift(plan, sets))
        with Routing() as routing:
            routes, rules = routing.routes(self._site), routing.rules(self._site)
        found += [f"missing: {route}" for route in plan.routes if route not in routes]
        found += [f"missing: {rule}" for rule in plan.ip_rules if rule not in rules]
        return found

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
        for hook in table.hooks:
            if jumps.count((hook.builtin, hook.chain)) != 1:
                yield f"{where}: {hook.builtin} does not jump to {hook.chain} once"

    def foreign(self) -> dict[tuple[int, str], Present]:
        """Return what the tables hold, ours and others', for the preflight checks."""
        with self._errors():
            return self._read()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (TableError, SetError, RoutingError) as problem:
            raise BackendError(str(problem)) from None


def _not_as_given(left: list[str]) -> str:
    return f"the kernel does not hold what it was given: {'; '.join(left[:3])}"


def _set_drift(plan: Plan, sets: Sets) -> Iterator[str]:
    present = sets.read()
    wanted = {members.name: members for members in plan.sets}
    for name in sorted(wanted.keys() | present.keys()):
        if name not in present:
            yield f"set {name} is missing"
        elif name not in wanted:
            yield f"set {name} is left over"
        elif frozenset(present[name].members) != frozenset(wanted[name].members):
            yield f"set {name} has other members"
