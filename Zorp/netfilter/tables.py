"""Our chains in the tables of the kernel: reading, replacing and removing them, table by table.

Theory of operation
    A Change says what one table shall hold of ours.  Every writer makes it in one commit, so a
    table has the old rules or the new ones and nothing between.  Only chains that begin with
    ZORP are touched, and in built-in chains only jumps to such chains.

    RestoreWriter feeds iptables-restore --noflush, of either kind of iptables, and can ask
    first whether a change would be taken.  LegacyWriter drives python-iptables, which knows the
    legacy tables only; every table gets a process of its own, because the library keeps state
    that outlives a closed table, is not shared well between the families, and can crash.  What
    the library spoils is refused by check(), before anything is changed, with the policy's rule:
    1.2.0 loses --reqid, so that a rule for one IPsec tunnel would hold for all traffic, and
    damages its memory when it builds an NFLOG target, which every DenyService with logging
    needs.  That is why LegacyWriter is used by sites that ask for it (backend: legacy), and a
    legacy host gets iptables-restore otherwise: it takes every plan, and all of a table at once.

    Both kinds are read back with iptables-save of that kind.

Errors: TableError, with the table and what the kernel or the library said.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

from Zorp.netfilter import children
from Zorp.netfilter.plan import CHAIN_PREFIX, Chain, Plan, Rule, Table
from Zorp.netfilter.render import Present, expected, parse_save, text_of, words_of

TABLES = ("nat", "filter", "mangle")         # in the order of loading, see loading_order()
_DEADLINE_S = 120
_COMMAND = {4: "iptables", 6: "ip6tables"}
_CHILD = "Zorp.netfilter.legacy_child"


def loading_order(*, default_deny: bool) -> tuple[str, ...]:
    """Return the tables in the order of loading: who reads marks before who writes them.

    With default_deny unmarked packets are dropped, so all can be ready before mangle decides who
    passes.  Without it the chains of filter let them pass: what stood there before, a guard that
    forwards nothing or the old rules, stays until mangle marks what must not.
    """
    return TABLES if default_deny else ("nat", "mangle", "filter")


class TableError(Exception):
    """A table could not be read or changed; `str()` is for the administrator."""


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one table."""

    table: Table                             # those of our chains that are new or say something else from now on
    remove: tuple[str, ...] = ()             # our chains that go
    insert: tuple[tuple[str, str], ...] = () # (built-in chain, our chain): jumps to put at the head
    append: tuple[tuple[str, str], ...] = () # the same at the end
    delete: tuple[tuple[str, str], ...] = () # jumps to take out, one for each that is there

    def __bool__(self) -> bool:
        """Return whether anything changes."""
        return bool(self.table.chains or self.remove or self.insert or self.append or self.delete)

    def text(self) -> str:
        """Return the change as input of iptables-restore --noflush."""
        hooks = [f"-D {builtin} -j {chain}" for builtin, chain in self.delete]
        hooks += [f"-I {builtin} -j {chain}" for builtin, chain in self.insert]
        hooks += [f"-A {builtin} -j {chain}" for builtin, chain in self.append]
        return text_of(self.table, remove=self.remove, add_hooks=hooks)


class Writer(Protocol):
    """How tables are read and changed."""

    name: str

    def read(self, family: int) -> dict[str, Present]:
        """Return table name -> content."""

    def check(self, plan: Plan) -> None:
        """Raise TableError, naming a rule of a policy, when a plan cannot be written this way at all."""

    def test(self, change: Change) -> None:
        """Raise TableError when the change would be refused, as far as that can be known."""

    def write(self, change: Change) -> None:
        """Make the change in one commit; raises TableError, and then nothing has changed."""


def change_to(wanted: Table, present: Present | None, hooks: str) -> Change:
    """Return the change from what a table holds to what it shall hold.

    hooks: where new jumps go, "first" or "last"; jumps that are there stay where they are.
    """
    ours = present.ours if present is not None else {}
    said = expected(wanted.chains, wanted.family)
    changed = tuple(chain for chain in wanted.chains if ours.get(chain.name) != said[chain.name])
    jumps = hooks_of(present)
    wanted_jumps = [(hook.builtin, hook.chain) for hook in wanted.hooks]
    missing = tuple(jump for jump in wanted_jumps if jump not in jumps)
    surplus = [jump for jump in jumps if jump not in wanted_jumps] if wanted.hooks or not wanted.chains else []
    surplus += [jump for jump in set(jumps) & set(wanted_jumps) for _ in range(jumps.count(jump) - 1)]
    return Change(Table(wanted.family, wanted.name, changed, wanted.hooks), tuple(sorted(ours.keys() - said.keys())),
                  insert=tuple(reversed(missing)) if hooks != "last" else (),
                  append=missing if hooks == "last" else (), delete=tuple(sorted(surplus)))


def hooks_of(present: Present | None) -> list[tuple[str, str]]:
    """Return (built-in chain, our chain) of every plain jump to us, in their order."""
    found = []
    for builtin, lines in (present.builtin if present is not None else {}).items():
        for line in lines:
            words = line.split()
            if len(words) == 4 and words[2] == "-j" and words[3].startswith(CHAIN_PREFIX):
                found.append((builtin, words[3]))
    return found


def undo(change: Change, before: Present | None, kind: str) -> None:
    """Give a table the chains and jumps of ours back that it had before a change.  Raises TableError.

    kind: nft or legacy; also what python-iptables wrote is put back this way, in the words of
    iptables-save.
    """
    table = change.table
    old = before.ours if before is not None else {}
    gone = [chain.name for chain in table.chains if chain.name not in old]
    lines = [f"*{table.name}", *(f":{name} - [0:0]" for name in (*old, *gone))]
    lines += [f"-D {builtin} -j {chain}" for builtin, chain in (*change.insert, *change.append)]
    lines += [f"-I {builtin} -j {chain}" for builtin, chain in change.delete]
    lines += [*(before.lines if before is not None else ()), *(f"-X {name}" for name in gone), "COMMIT", ""]
    run([f"{_COMMAND[table.family]}-{kind}-restore", "--noflush"],
        f"{_COMMAND[table.family]} table {table.name}, going back", "\n".join(lines))


# ---------------------------------------------------------------------------- iptables-restore

class RestoreWriter:
    """Writes with iptables-restore; kind is nft or legacy."""

    def __init__(self, kind: str) -> None:
        self.name = {"nft": "nft", "legacy": "legacy-restore"}[kind]
        self._kind = kind

    def read(self, family: int) -> dict[str, Present]:
        return read_tables(family, self._kind)

    def check(self, plan: Plan) -> None:
        """All plans can be written."""

    def test(self, change: Change) -> None:
        self._restore(change, "--test")

    def write(self, change: Change) -> None:
        self._restore(change)

    def _restore(self, change: Change, *arguments: str) -> None:
        table = change.table
        command = [f"{_COMMAND[table.family]}-{self._kind}-restore", "--noflush", *arguments]
        if self._kind == "legacy":
            command += ["--wait", str(_DEADLINE_S // 2)]
        run(command, f"{_COMMAND[table.family]} table {table.name}", change.text())


def read_tables(family: int, kind: str) -> dict[str, Present]:
    """Return what the tables of a family hold, of either kind of iptables."""
    return parse_save(run([f"{_COMMAND[family]}-{kind}-save"], f"{_COMMAND[family]}, reading back"))


def run(command: list[str], what: str, text: str = "") -> str:
    """Run a program with this input; return its output.  Raises TableError."""
    try:
        result = children.run(command, text, _DEADLINE_S)
    except children.ProgramMissing as problem:
        raise TableError(f"{what}: {problem}; install the package iptables") from None
    except children.ChildError as problem:
        raise TableError(f"{what}: {problem}") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line and not line.startswith("Try `")]
        raise TableError(f"{what}: {'; '.join(lines[:3]) or f'{command[0]} failed'}{_line_at(text, result.stderr)}")
    return result.stdout


def _line_at(text: str, complaint: str) -> str:
    """Return the line that iptables-restore complains about."""
    for word in reversed(complaint.replace(":", " ").split()):
        if word.isdigit() and 1 < int(word) <= len(lines := text.splitlines()):
            return f"; at: {lines[int(word) - 1]}"
    return ""


# ---------------------------------------------------------------------------- python-iptables

class LegacyWriter:
    """Writes with python-iptables, in a process per table."""

    name = "legacy"

    def read(self, family: int) -> dict[str, Present]:
        return read_tables(family, "legacy")

    def check(self, plan: Plan) -> None:
        for table in plan.tables:
            for chain in table.chains:
                for rule in chain.rules:
                    if problem := _spoilt(rule):
                        raise TableError(f"{_rule_of(chain, rule, plan)}: {problem}")

    def test(self, change: Change) -> None:
        """Build the rules without committing them."""
        self._run(change, commit=False)

    def write(self, change: Change) -> None:
        self._run(change, commit=True)

    @staticmethod
    def _run(change: Change, *, commit: bool) -> None:
        table = change.table
        where = f"{_COMMAND[table.family]} table {table.name}"
        order = {
            "family": table.family, "table": table.name, "commit": commit, "remove": change.remove,
            "chains": [[chain.name, [asdict(words_of(rule, table.family)) for rule in chain.rules]]
                       for chain in table.chains],
            "insert": change.insert, "append": change.append, "delete": change.delete,
        }
        try:
            children.obeyed(_CHILD, order, _DEADLINE_S)
        except children.ChildError as problem:
            raise TableError(f"{where}, python-iptables: {problem}") from None


def _spoilt(rule: Rule) -> str:
    """Return what python-iptables would spoil about a rule, and the remedy; empty: nothing."""
    if rule.target.what == "nflog":
        return "python-iptables cannot log refused connections; set backend: legacy-restore, " \
               "or logging=FALSE in the DenyService and no log_unmatched"
    if any(test.what == "reqid" for test in rule.tests):
        return "python-iptables cannot test IPsec request ids; set backend: legacy-restore"
    return ""


def _rule_of(chain: Chain, rule: Rule, plan: Plan) -> str:
    """Return which rule of a policy a packet rule comes from."""
    name = rule.target.values[0] if rule.target.what == "goto" else chain.name
    number = name.removeprefix(CHAIN_PREFIX)[2:]
    found = next((index for index in plan.indexes if str(index.index) == number), None)
    return f"instance '{found.instance}', rule {found.rule_id}" if found is not None else f"chain {chain.name}"
