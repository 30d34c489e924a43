"""The fuzz runner runs every target, counts what it ran, and finds what is there to find."""

from __future__ import annotations

import sys
import types

import pytest

from test.fuzz import run


def test_all_targets_run_and_are_counted(capsys):
    assert run.main(["--inputs", "500", "--seed", "1"]) == 0
    assert "500 inputs run" in capsys.readouterr().out


def test_a_finding_is_shown_with_its_input(monkeypatch, capsys):
    def one_input(data):
        assert b"b" not in data

    monkeypatch.setitem(
        sys.modules, "test.fuzz.broken", types.SimpleNamespace(one_input=one_input, PIECES=[b"a", b"b"])
    )
    with pytest.raises(AssertionError):
        run.run("broken", 100, 1)
    assert "FINDING in broken, seed 1" in capsys.readouterr().err
