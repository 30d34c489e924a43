"""Every statement of the papers is tested or has a reason why not."""

from __future__ import annotations

import ast
import pathlib

from test.seeds import LATER, STATEMENTS


def _covered():
    """Return every number that a test of this directory claims."""
    numbers = []
    for path in sorted(pathlib.Path(__file__).parent.glob("test_s00*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "covers":
                numbers += [argument.value for argument in node.args]
    return numbers


def test_every_statement_is_covered_or_comes_later():
    # given the numbers of the papers
    every = {f"{paper}-{number}" for paper, count in STATEMENTS.items() for number in range(1, count + 1)}
    # then each is claimed by a test or listed with a reason, never both
    covered = set(_covered())
    assert sorted(every - covered - LATER.keys()) == []
    assert sorted(covered & LATER.keys()) == []
    assert sorted((covered | LATER.keys()) - every) == []
