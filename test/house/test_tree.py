"""Rules of the house that hold for every file: sizes, documentation, nothing from somebody's machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test.support import tree

MODULE_LINES = 800
FUNCTION_LINES = 70

# A directory of somebody's own, or a host that packages come from: neither belongs in a file.
# Written in parts, so that this file obeys its own rule.
_MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:" + "ro" "ot|wo" "rk|ho" "me" + r")/[\w.]")
_REGISTRIES = re.compile("|".join(("py" r"pi\.", "pythonhos" "ted", r"deb\.deb" "ian", r"proxy\.gol" "ang",
                                   r"registry\.n" "pm")))


def _functions(syntax):
    return [node for node in ast.walk(syntax) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.fixture(scope="module")
def python_files():
    """A function that returns {relative path: syntax tree} of the Python files below some directories, or of all."""
    parsed = tree.python_files()

    def below(*directories):
        return {path: syntax for path, syntax in parsed.items() if not directories or path.parts[0] in directories}

    return below


def _public(body):
    return [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"]


def test_no_module_is_too_long(python_files):
    # given every Python file
    long = {str(path): len((tree.ROOT / path).read_text("utf-8").splitlines()) for path in python_files()}
    # then none has more lines than a reader keeps in mind
    assert {path: lines for path, lines in long.items() if lines > MODULE_LINES} == {}


def test_no_function_is_too_long(python_files):
    # given every function of the tree
    long = {f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
            for path, syntax in python_files().items() for node in _functions(syntax)}
    # then none is longer than a screen
    assert {place: lines for place, lines in long.items() if lines > FUNCTION_LINES} == {}


def test_every_module_says_what_it_is_about(python_files):
    # given every Python file of the program that is not empty
    files = python_files("Zorp", "zorpctl", "sbin", "bench", "test")
    silent = [str(path) for path, syntax in files.items() if syntax.body and ast.get_docstring(syntax) is None]
    # then it opens with its theory of operation
    assert silent == []


def test_public_names_of_policy_modules_are_documented(python_files):
    # given the classes and functions that a policy can import
    silent = [f"{path}:{node.lineno} {node.name}"
              for path, syntax in python_files("Zorp").items() if len(path.parts) == 2
              for node in _public(syntax.body) if ast.get_docstring(node) is None]
    # then each says what it is
    assert silent == []


@pytest.mark.parametrize("pattern", [_MACHINE_PATHS, _REGISTRIES], ids=["machine paths", "package registries"])
def test_no_file_names_a_machine(pattern):
    # given every tracked text
    found = [f"{path}:{number}: {line.strip()[:80]}" for path, text in tree.texts()
             for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    # then none holds what is true on one machine only
    assert found == []


def test_the_rules_find_what_they_forbid():
    # given lines that break them, and lines that only look so
    broken = ["see /" + "root/.cache/x", "cd /" + "work/tree", "'/" + "home/me/policy.py'"]
    harmless = ["/etc/zorp/policy.py", "doc/" + "work/x", "/network/x", "~/" + "root/x"]
    # then the pattern knows them apart
    assert [bool(_MACHINE_PATHS.search(line)) for line in broken + harmless] == [True] * 3 + [False] * 4
    assert _REGISTRIES.search("https://py" + "pi.org/simple")


def test_layers_hold():
    """The import-linter contract of pyproject.toml: no arrow turns round."""
    # when the linter reads every import of the package
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter, "--no-cache"], cwd=tree.ROOT, capture_output=True, text=True)
    # then no module imports from a layer above its own
    assert result.returncode == 0, result.stdout


def test_no_import_hides_inside_a_function(python_files):
    """What a module needs stands at its top: an arrow hidden in a function is still an arrow."""
    # given every function of the package
    hidden = [f"{path}:{inner.lineno}" for path, syntax in python_files("Zorp", "zorpctl").items()
              for function in _functions(syntax) for inner in ast.walk(function)
              if (isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("Zorp"))
              or (isinstance(inner, ast.Import) and any(name.name.startswith("Zorp") for name in inner.names))]
    # then none imports a module of ours
    assert hidden == []
