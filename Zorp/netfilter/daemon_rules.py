"""What kzorpd holds in the packet filter: descriptions, the plan made of them, the kernel.

Theory of operation
    Everything that changes packet rules goes through one step, _put_in_force(): compile all
    descriptions with the present addresses of host names, carry the plan to the kernel, write
    the state down.  When compiling or carrying fails, nothing has changed: neither the kernel
    (the back end sees to that), nor the state, nor what is shown.

    Other addresses of host names change sets, not rules: then only the sets are carried over.

    Forwarded connections are decided about after every change.  That these decisions are due is in
    the state before the kernel is changed, so neither the death of kzorpd nor an error of
    connection tracking is the end of it: the next check tries again.

    look_for_drift() compares the kernel with the plan; what others have changed is reported, and
    put right if the site wants that.  Rules of the site that stand before ours are reported only.
    A reload looks, too: it succeeds over rules in force only.

    In mode "listeners" the descriptions are kept and shown, and the kernel is left alone.

Whose zones are in force
    A running instance hands its description over when it starts and reloads; that is what it
    serves.  Reading policy files again (reload) therefore takes from the file of such an
    instance its zones only; an instance that never handed over, or has said that it stopped, is
    taken as the file says, and packets for its proxies are dropped as long as it has no ports,
    because it never ran.
    A zone that a rule in force names cannot go: the rule would match nothing, or, as in the
    original, everything.

Rules of one instance without those of another
    What a rule keeps for a proxy, or refuses, another instance's PFService may cover as well.  So
    as long as the policy of one instance cannot be read and no rules of it are in force either,
    everything that is in force stays as it is, zones included; only rules that forward nothing are
    added (Zorp.netfilter.caution).

    So an instance that is no longer in instances.conf keeps what its rules took, and nothing passes
    by them any more: the file may be half-written, and whoever asks for the reload may have waited
    for that.  With its line the rules come back.  They go when kzorpd starts and somebody else has
    rules; the last ones never go by reading files, because the host would be open without them.

    An instance that stops keeps its rules, or, where the site wants the original's way (on_stop:
    flush), has rules only while it runs.  Rules go only when user 0 says that it has stopped; when
    the instance itself does, they stay and let nothing pass (Zorp.netfilter.daemon_control).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set

from pyroute2.netlink.exceptions import NetlinkError

from Zorp.Log import log
from Zorp.netfilter import preflight
from Zorp.netfilter.backend import BackendError, open_backend
from Zorp.netfilter.caution import closed, lacks_port, opening, until_it_runs
from Zorp.netfilter.compiler import CompileError, IndexState, compile_plan
from Zorp.netfilter.evaluator import Evaluator
from Zorp.netfilter.instance_zones import Zoned, described, zoned
from Zorp.netfilter.known_addresses import KnownAddresses
from Zorp.netfilter.plan import Plan, RuleIndex
from Zorp.netfilter.render import Present
from Zorp.netfilter.sessions import begin_anew, settle
from Zorp.netfilter.site import Site
from Zorp.netfilter.store import Entry, State, Store, StoreError
from Zorp.rules.description import (
    DescriptionError,
    InstanceDescription,
    ZoneData,
    check,
)

_EMPTY = Plan(tables=(), sets=(), ip_rules=(), routes=(), indexes=())


class RulesError(Exception):
    """The packet rules stay as they are; `str()` is for the administrator."""


class PacketRules:
    """The packet rules of this host; the loop's."""

    def __init__(self, site: Site, backend=None) -> None:
        self._site = preflight.adapted(site)
        self._store = Store(site.state_dir)
        self._known = KnownAddresses(site.state_dir)
        self._backend = backend
        self._addresses: Mapping[str, Iterable[str]] = {}
        self._is_behind = False                          # the zones have addresses that the kernel has not
        self._instances: list[Zoned] = []
        self._by_index: dict[int, RuleIndex] = {}
        self._former: dict[int, RuleIndex] = {}          # rules that connections may have until they are settled
        self._zone_conditions: dict[tuple[str, int], tuple[bool, bool]] = {}
        self._reported: frozenset[preflight.Finding] = frozenset()
        self._overtaken: frozenset[preflight.Finding] = frozenset()      # those of the last look at what others do
        self._unread: frozenset[str] = frozenset()
        self.state = State()
        self.plan = _EMPTY
        self.evaluator = Evaluator(())

    @property
    def is_active(self) -> bool:
        """True when this host wants packet rules."""
        return self._site.mode != "listeners"

    # ---- what is shown

    def hostnames(self) -> set[str]:
        """Return every host name that a zone has."""
        return {name for _, zones in self._instances for name in zones.hostnames()}

    def addresses(self) -> dict[str, list[str]]:
        """Return the addresses of host names as they were taken last."""
        return {name: list(addresses) for name, addresses in self._addresses.items()}

    def rule_of(self, index: int) -> RuleIndex | None:
        """Return the rule that a number in a connection mark stands for."""
        return self._by_index.get(index)

    def zone_conditions(self, rule: RuleIndex) -> tuple[bool, bool]:
        """Return whether a rule asks for zones of clients and of servers."""
        return self._zone_conditions.get((rule.instance, rule.rule_id), (False, False))

    # ---- changes

    def restore(self) -> None:
        """Put in force what was in force when kzorpd ended.

        Raises RulesError; the state is kept then, every later change includes it and retry() tries again.
        """
        self.state = self._store.read()
        self._addresses = self._known.read()
        self._put_in_force(self.state, is_first=True)

    def retry(self) -> None:
        """Put the state in force if that has not succeeded yet; a host may have been repaired.  Raises RulesError."""
        if self.is_active and self.state.entries and self.plan is _EMPTY:
            self._put_in_force(self.state, is_first=True)

    def hand_over(self, description: InstanceDescription) -> None:
        """Put in force what a running instance wants.  Raises RulesError."""
        self._put_in_force(self.state.with_entry(Entry(description, handed_over=True)))

    def remove(self, instance: str) -> None:
        """Forget an instance.  Raises RulesError."""
        self._put_in_force(self.state.without(instance))

    def instance_stopped(self, instance: str, *, is_trusted: bool) -> None:
        """Do what the site wants done with the rules of an instance that has stopped.  Raises RulesError.

        not is_trusted: who says so may not take rules away; they let nothing pass any more instead.
        """
        entry = self.state.entry(instance)
        if entry is None:
            return
        if self._site.on_stop != "flush":
            if entry.handed_over:
                self._put_in_force(self.state.with_entry(dataclasses.replace(entry, handed_over=False)))
            return
        if is_trusted:
            self.remove(instance)
            return
        log(None, "core.info", 3, "Instance has stopped, what its rules took is dropped until it starts or user 0 runs "
            "zorpctl stop; instance='%s'", (instance,))
        self._put_in_force(self.state.with_entry(dataclasses.replace(entry, description=closed(entry.description))))

    def miss(self, unread: Iterable[str]) -> None:
        """Note the instances whose policies could not be read; "" stands for one whose name is not known."""
        self._unread = frozenset(unread)

    def take_policies(self, descriptions: Mapping[str, InstanceDescription], known: frozenset[str] | None, *,
                      is_start: bool) -> None:
        """Put in force what the policy files of all instances say, as far as that goes (see above).

        known: the names in instances.conf, None when there is no such file; what the rules of others
        took is dropped, or they go.
        is_start: the files were read because kzorpd has started; instances that have handed over
        keep everything.  Raises RulesError.
        """
        if self._site.on_stop == "flush":
            descriptions = {name: found for name, found in descriptions.items() if self.state.entry(name) is not None}
        state = self._without_strangers(self.state, known, descriptions.keys(), is_start=is_start)
        for name, description in descriptions.items():
            entry = state.entry(name)
            if entry is None or not entry.handed_over:
                state = state.with_entry(Entry(_of_file(description)))
            elif not is_start:
                state = state.with_entry(Entry(_with_zones(entry.description, description.zones), handed_over=True))
        self._put_in_force(state)

    def _without_strangers(self, state: State, known: frozenset[str] | None, described: Set[str], *,
                           is_start: bool) -> State:
        """Return the state with instances that left instances.conf closed, or gone, and with those that came back."""
        if known is None or "" in self._unread:
            return state
        known |= self._unread
        others = bool(described) or any(entry.description.instance in known for entry in state.entries)
        for entry in state.entries:
            name = entry.description.instance
            if name in known:
                state = state.with_entry(dataclasses.replace(entry, is_stranger=False))
            elif is_start and others:
                log(None, "core.info", 3, "Instance left instances.conf, its packet rules go; "
                    "instance='%s'", (name,))
                state = state.without(name)
            else:
                log(None, "core.error", 1, "Instance left instances.conf, what its rules took is dropped; "
                    "instance='%s', repair='put its line back and reload kzorpd, or %s'",
                    (name, "restart kzorpd to have them go" if others else "stop kzorpd and run kzorp-setup unload"))
                state = state.with_entry(dataclasses.replace(entry, is_stranger=True))
        return state

    def replace_zones(self, zones: tuple[ZoneData, ...]) -> None:
        """Give every instance these zones.  Raises RulesError."""
        self._put_in_force(State(tuple(
            dataclasses.replace(entry, description=_with_zones(entry.description, zones))
            for entry in self.state.entries), self.state.indexes))

    def empty_zones(self) -> None:
        """Take the nets and host names of all zones away; the zones and rules stay.  Raises RulesError."""
        self._put_in_force(State(tuple(
            dataclasses.replace(entry, description=dataclasses.replace(entry.description, zones=tuple(
                dataclasses.replace(zone, nets=(), hostnames=()) for zone in entry.description.zones)))
            for entry in self.state.entries), self.state.indexes))

    def take_addresses(self, addresses: Mapping[str, Iterable[str]]) -> bool:
        """Take the addresses of host names; return whether a zone changed.

        Raises RulesError; the next call tries again.
        """
        self._addresses = dict(addresses)
        changed = [description.instance for description, zones in self._instances if zones.feed(self._addresses)]
        self._known.write(self._addresses)
        self._is_behind |= bool(changed)
        if not self._is_behind:
            return False
        plan = self._compiled(self._instances, self.state.indexes)
        self._carry(plan, sets_only=plan.tables == self.plan.tables)
        self.plan, self._is_behind = plan, False
        return True

    def _put_in_force(self, state: State, *, is_first: bool = False) -> None:
        instances = zoned(state.descriptions, self._addresses)
        plan = self._compiled(instances, state.indexes)
        self._refuse_to_open(state.descriptions)
        state = State(state.entries, IndexState.of(plan, state.indexes))
        changes = plan != self.plan or (is_first and bool(state.entries))
        if not changes:
            state = dataclasses.replace(state, is_settled=self.state.is_settled)
        try:
            with self._store.lock():
                self._take(state, plan if changes else None)
        except StoreError as problem:
            raise RulesError(str(problem)) from None
        except RulesError:
            self._settle_sessions()                      # what began meanwhile need not be permitted by the old rules
            raise
        if changes and not self._site.keep_sessions:
            self._former |= {rule.index: rule for rule in self.plan.indexes}
        self.plan, self._instances = plan, instances
        self._by_index = {rule.index: rule for rule in plan.indexes}
        self._zone_conditions = {(description.instance, rule.rule_id): (bool(rule.src_zone), bool(rule.dst_zone))
                                 for description in state.descriptions for rule in description.rules}
        self.evaluator = Evaluator(instances)
        self._settle_sessions()

    def _take(self, state: State, plan: Plan | None) -> None:
        """Carry a plan to the kernel, None: it is there, and make `state` the state."""
        if plan is None:
            self._store.write(state)
        else:
            before, self.state = self.state, self.state.before_a_change(state)
            with self._store.replacing(before, state):
                self._carry(plan)
        self.state = state

    def _refuse_to_open(self, descriptions: tuple[InstanceDescription, ...]) -> None:
        """Raises RulesError when these might forward more than those in force while rules of somebody are missing."""
        missing = sorted(self._unread - {description.instance for description in descriptions})
        if missing and (what := opening(self.state.descriptions, descriptions)):
            who = f"of instance '{missing[0]}'" if missing[0] else "of a line of instances.conf"
            raise RulesError(f"{what} what the policy {who} keeps for a proxy or refuses, and that policy cannot be "
                             "read; repair it and reload kzorpd")

    def _settle_sessions(self) -> str | None:
        """Forwarded connections do not outlive their rule; return why that is not so, the next check tries again."""
        if not self.is_active or (self.plan is _EMPTY and self.state.entries):
            return None                                  # the rules are not in force yet, see retry()
        try:
            if self.state.is_settled or self._site.keep_sessions:
                begin_anew(self._site)
                return None
            ended, _ = settle(self._site, self._former.values(), self.plan.indexes, self.state.descriptions,
                              self.evaluator)
            self._write_settled()
        except (OSError, NetlinkError, StoreError) as problem:
            log(None, "core.error", 1, "Forwarded sessions whose rule is gone cannot be ended; error='%s'", (problem,))
            return f"forwarded sessions whose rule is gone cannot be ended: {problem}"
        self._former = {}
        if ended:
            log(None, "core.info", 3, "Forwarded sessions ended with their rule; count='%d'", (ended,))
        return None

    def _write_settled(self) -> None:
        state = dataclasses.replace(self.state, is_settled=True)
        with self._store.lock():
            self._store.write(state)
        self.state = state

    def _compiled(self, instances: list[Zoned], indexes: IndexState) -> Plan:
        if not instances or not self.is_active:
            return _EMPTY                                # nobody wants anything: the host is as without us
        try:
            return compile_plan(described(instances), self._site, indexes)
        except CompileError as problem:
            raise RulesError(str(problem)) from None

    def _carry(self, plan: Plan, *, sets_only: bool = False) -> None:
        if not self.is_active:
            return
        try:
            if self._backend is None:
                self._backend = open_backend(self._site)
            if plan is _EMPTY:
                self._backend.unload()
            elif sets_only:
                self._backend.update_sets(plan)
            else:
                self._look_at_host(plan)
                self._backend.apply(plan)
        except BackendError as problem:
            raise RulesError(str(problem)) from None

    def _look_at_host(self, plan: Plan) -> None:
        """Report what this host lacks for a plan, each finding once as long as it lasts.  Raises RulesError."""
        found = preflight.findings(self._site, plan, self._backend.foreign(), self._backend.name)
        for finding in found:
            if finding not in self._reported and not finding.is_error:
                log(None, "core.error", 2, "%s", (finding,))
        self._reported = frozenset(found)
        if errors := [str(finding) for finding in found if finding.is_error]:
            raise RulesError("; ".join(errors))

    # ---- what others do

    def look_for_drift(self) -> str | None:
        """Compare the kernel with the plan, report differences, repair them if wanted; return what stays wrong."""
        if not self.is_active or self._backend is None:
            return None
        try:
            differences, present = self._backend.survey(self.plan)
        except BackendError as problem:
            log(None, "core.error", 1, "Packet rules cannot be read back; error='%s'", (problem,))
            return f"packet rules cannot be read back: {problem}"
        self._look_before_us(present)
        if not differences:
            return self._settle_sessions()
        repaired = self._site.on_drift == "repair" and self._repair()
        log(None, "core.error", 1, "Packet rules were changed by another program; differences='%d', first='%s', "
            "restored='%s'", (len(differences), differences[0], "yes" if repaired else "no"))
        if repaired:
            return self._settle_sessions()               # what began meanwhile need not be permitted
        why = "on_drift is report" if self._site.on_drift == "report" else "the log says why they cannot be restored"
        return f"packet rules were changed by another program and stay so ({why}): {differences[0]}"

    def _look_before_us(self, present: Mapping[tuple[int, str], Present]) -> None:
        """Report what the site has put before our rules meanwhile."""
        found = frozenset(preflight.overtaken(self._site, self.plan, present, self._backend.name))
        for finding in found - self._reported:
            log(None, "core.error", 2, "%s", (finding,))
        self._reported = (self._reported - self._overtaken) | found
        self._overtaken = found

    def _repair(self) -> bool:
        try:
            self.state = dataclasses.replace(self.state, is_settled=False)
            with self._store.lock():
                self._store.write(self.state)
                self._backend.apply(self.plan)
        except (BackendError, StoreError) as problem:
            log(None, "core.error", 1, "Packet rules cannot be restored; error='%s'", (problem,))
            return False
        return True


def _of_file(description: InstanceDescription) -> InstanceDescription:
    """Return what comes into force of a policy file: its proxies may have no ports yet."""
    if lacks_port(description):
        log(None, "core.info", 3, "Instance has never run, packets for its proxies are dropped until it starts; "
            "instance='%s'", (description.instance,))
    return until_it_runs(description)


def _with_zones(description: InstanceDescription, zones: tuple[ZoneData, ...]) -> InstanceDescription:
    """Return the description with other zones.  Raises RulesError when a rule would lose one."""
    changed = dataclasses.replace(description, zones=zones)
    try:
        check(changed)
    except DescriptionError as problem:
        raise RulesError(str(problem)) from None
    return changed
