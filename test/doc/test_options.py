"""The page of options has every option of config.options, with its default."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

from test.support import tree

PAGE = tree.ROOT / "doc" / "options.md"
_FLAGS = {"TRUE": 1, "FALSE": 0}
_ROW = re.compile(r"^\| `(\w+)` \| `([^`]*)` \| (\w*) ?\| (.+) \|$", re.MULTILINE)


def documented() -> dict[str, object]:
    """Every option of the page with its default."""
    return {found[1]: _FLAGS[found[2]] if found[2] in _FLAGS else ast.literal_eval(found[2])
            for found in _ROW.finditer(PAGE.read_text("utf-8"))}


def test_the_page_of_options_is_complete_and_right_about_defaults():
    # given the options of a process that has loaded no policy
    result = subprocess.run(
        [sys.executable, "-c", "from Zorp.Config import config; print(vars(config.options))"],
        capture_output=True, text=True, check=True, cwd=tree.ROOT)
    options = ast.literal_eval(result.stdout)
    # then the page has them all, no others, and their defaults
    assert documented() == options


def test_no_option_stands_twice_or_in_an_unreadable_row():
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) == len(documented())


def test_what_is_said_to_have_no_effect_has_none():
    # given the options below the last heading
    idle = [found[1] for found in _ROW.finditer(PAGE.read_text("utf-8").partition("## Without effect")[2])]
    # then no module asks for one of them
    sources = [path.read_text("utf-8") for path in (tree.ROOT / "Zorp").rglob("*.py")]
    assert idle
    assert [name for name in idle if any(f"options.{name}" in text for text in sources)] == []
