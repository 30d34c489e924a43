"""Completion of zorpctl's command line in bash."""

from __future__ import annotations

import subprocess

import pytest

from test.support.host import ROOT
from zorpctl.cli import COMMANDS

COMPLETION = ROOT / "etc" / "zorpctl.bash"


def complete(*words: str, instances: str = "") -> list[str]:
    """What bash would offer for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
        source {COMPLETION}
        _zorpctl_instances() {{ printf '%s\\n' {instances}; }}
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        _zorpctl
        printf '%s\\n' "${{COMPREPLY[@]}}"
        """
    result = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout.split()


def test_every_command_is_offered():
    # when there is nothing yet
    offered = complete("zorpctl", "")
    # then every command is there, and no other
    assert {word for word in offered if not word.startswith("-")} == set(COMMANDS)


@pytest.mark.parametrize(("words", "offered"), [
    (("zorpctl", "reload-"), ["reload-or-restart"]),
    (("zorpctl", "status", "in"), ["intra"]),
    (("zorpctl", "--start", ""), ["intra", "mail", "mail#1"]),
    (("zorpctl", "-c", "x", "log", "intra", "--v"), ["--vinc", "--vdec", "--vset"]),
    (("zorpctl", "log", "-s", "1"), ["1", "10"]),
    (("zorpctl", "szig", "-r", "s"), ["service", "stats"]),
])
def test_what_follows(words, offered):
    assert complete(*words, instances="intra mail mail#1") == offered


def test_names_come_from_instances_conf(tmp_path):
    # given a file with a comment and an indented line
    conf = tmp_path / "instances.conf"
    conf.write_text("# comment\nintra --policy x\n  mail-2.b --policy y\n")
    text = COMPLETION.read_text().replace("/etc/zorp/instances.conf", str(conf)).replace("/run/zorp", str(tmp_path))
    (tmp_path / "zorp-extra.pid").write_text("1\n")
    result = subprocess.run(["bash", "-c", f"{text}\n_zorpctl_instances"], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["intra", "mail-2.b", "extra"]
