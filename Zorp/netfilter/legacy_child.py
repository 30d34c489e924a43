"""One legacy table, changed with python-iptables: the process that Zorp.netfilter.tables starts.

Standard input holds one JSON object: family, table, commit, remove, chains, insert, append,
delete, as in tables.Change with rules taken apart into words.  Exit status 0: done; 1: nothing
has changed, and the last line on standard error says why.

The process ends after its one table: the library may not use a table that was closed, and what
it loaded for one family disturbs the other.
"""

from __future__ import annotations

import importlib
import json
import sys


def main() -> int:
    """Do what standard input says; return the exit status."""
    try:
        iptc = importlib.import_module("iptc")
    except ImportError:
        print("python-iptables is missing; install the extra 'legacy-tables', or set backend: legacy-restore",
              file=sys.stderr)
        return 1
    try:
        _Table(iptc, json.load(sys.stdin)).change()
    except (iptc.IPTCError, ValueError, AttributeError, KeyError, OSError) as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 1
    return 0


class _Table:
    """The table of an order, open until the end of the process."""

    def __init__(self, iptc, order: dict) -> None:
        self._iptc, self._order = iptc, order
        is_six = order["family"] == 6
        self._table = (iptc.Table6 if is_six else iptc.Table)(order["table"], autocommit=False)
        self._table.refresh()
        self._rule_class = iptc.Rule6 if is_six else iptc.Rule

    def change(self) -> None:
        order, table = self._order, self._table
        for name in (*order["remove"], *(name for name, _ in order["chains"])):
            if table.is_chain(name):
                table.flush_entries(name)
            else:
                table.create_chain(name)
        self._change_hooks()
        for name, rules in order["chains"]:
            chain = self._iptc.Chain(table, name)
            for words in rules:
                chain.append_rule(self._rule(chain, words))
        for name in order["remove"]:
            table.delete_chain(name)
        if order["commit"]:
            table.commit()
        table.close()

    def _change_hooks(self) -> None:
        for builtin, chain in self._order["delete"]:
            hooked = self._iptc.Chain(self._table, builtin)
            hooked.delete_rule(self._jump(hooked, chain))
        for builtin, chain in self._order["insert"]:
            hooked = self._iptc.Chain(self._table, builtin)
            hooked.insert_rule(self._jump(hooked, chain))
        for builtin, chain in self._order["append"]:
            hooked = self._iptc.Chain(self._table, builtin)
            hooked.append_rule(self._jump(hooked, chain))

    def _jump(self, chain, target: str):
        rule = self._rule_class(chain=chain)
        rule.target = self._iptc.Target(rule, target)
        return rule

    def _rule(self, chain, words: dict):
        rule = self._rule_class(chain=chain)
        for part in words["parts"]:
            if part["module"]:
                self._add_match(rule, part)
            else:
                for name, (value,), negated in part["options"]:
                    setattr(rule, _ATTRIBUTES[name], ("!" if negated else "") + _NUMBERS.get(value, value))
        target = words["target"]
        made = self._iptc.Target(rule, target["module"], **({"goto": True} if words["is_goto"] else {}))
        for name, values, _ in target["options"]:
            made.set_parameter(name, list(values))
        rule.target = made
        return rule

    def _add_match(self, rule, part: dict) -> None:
        match = self._iptc.Match(rule, part["module"])
        for name, values, negated in part["options"]:
            match.set_parameter(name, [*(["!"] if negated else []), *values])
        rule.add_match(match)


_ATTRIBUTES = {"source": "src", "destination": "dst", "in-interface": "in_interface", "protocol": "protocol"}
# names that the library does not know
_NUMBERS = {"dccp": "33", "gre": "47", "esp": "50", "ah": "51", "ipv6-icmp": "58", "sctp": "132"}
