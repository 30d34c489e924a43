"""Whose directory the administrator stands in does not matter: no command imports from there."""

import re
import subprocess
import sys

import pytest

from test.support.daemon import ROOT
from test.support.host import PLUG, host
from test.support.kzorpd import kzorpd
from Zorp.netfilter.children import command_of

__all__ = ["host", "kzorpd"]
OURS = ("Zorp", "zorpctl", "pyroute2", "yaml", "iptc")


@pytest.fixture
def trap(tmp_path_factory):
    """A directory with a module of every name that anybody might import; each leaves a line in the file `hit`."""
    directory = tmp_path_factory.mktemp("trap")
    for name in (*sys.stdlib_module_names, *OURS):
        (directory / f"{name}.py").write_text(f"open({str(directory / 'hit')!r}, 'a').write({name!r})\n")
    return directory


def hit(trap) -> str:
    """Return what was imported from there."""
    return (trap / "hit").read_text() if (trap / "hit").exists() else ""


def test_the_trap_catches(trap):
    subprocess.run([sys.executable, "-c", "import json"], cwd=trap, capture_output=True, timeout=60, check=False)
    assert "json" in hit(trap)


@pytest.mark.netns
@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_commands_of_the_packet_level_import_nothing_from_the_current_directory(kzorpd, trap, backend):
    # given a host that keeps its rules with each of the programs that we have
    kzorpd.configure(f"backend: {backend}")
    kzorpd.write_policy(rules='Rule(rule_id=1, service="web", proto=6, dst_port=80)')
    # when user 0 runs every command there
    for program, *arguments in (("kzorp-setup", "check"), ("kzorp-setup", "print"), ("kzorp-setup", "guard"),
                                ("kzorp-setup", "load"), ("kzorp-setup", "boot"), ("kzorp-setup", "status"),
                                ("kzorp-setup", "unload"), ("kzorp", "-z"), ("kzorpd", "--help")):
        result = subprocess.run(kzorpd.words(program, *arguments), cwd=trap, capture_output=True, text=True,
                                timeout=60, check=False)
        # then all of them do their work, and none meets what lies there
        assert hit(trap) == "", (program, *arguments)
        assert result.returncode == 0, (program, *arguments, result.stderr)
        assert "was not tried out" not in result.stdout + result.stderr
    # and when he starts the daemon there, it loads the rules, and policies anew
    kzorpd.start(cwd=trap)
    assert kzorpd.say(b"RELOAD\n") == b"OK"
    assert kzorpd.command("status", program="kzorp-setup").stdout == "in force\n"
    assert hit(trap) == ""


def test_commands_of_instances_import_nothing_from_the_current_directory(host, trap):
    host.instance("intra", PLUG)
    control = [sys.executable, str(ROOT / "sbin/zorpctl"), "-c", str(host.etc / "zorpctl.conf")]
    zorp = [str(host.sbin / "zorp"), "--as", "intra", "--policy", str(host.etc / "intra.py")]
    for words in ([*control, "check"], [*control, "start"], [*control, "status", "-v"], [*control, "reload"],
                  [*control, "explain", "intra", "tcp", "127.0.0.1", "127.0.0.1:80", "lo"], [*control, "szig"],
                  [*control, "restart"], [*control, "stop"], [*zorp, "--check-policy"], [*zorp, "--describe"]):
        result = subprocess.run(words, cwd=trap, capture_output=True, text=True, timeout=60, check=False)
        assert hit(trap) == "", words
        assert result.returncode == 0, (words, result.stderr)


def test_a_child_gets_its_arguments_and_our_places(trap, tmp_path):
    # given a module in a place of ours
    (tmp_path / "told.py").write_text("import sys\ndef main():\n    print(sys.argv)\n    return 3\n")
    sys.path.append(str(tmp_path))
    try:
        command = command_of("told")
    finally:
        sys.path.remove(str(tmp_path))
    # when it is started from anywhere, with an environment that says otherwise
    result = subprocess.run([*command, "-x", "y"], cwd=trap, env={"PYTHONPATH": str(trap)}, capture_output=True,
                            text=True, timeout=60, check=False)
    # then it is run, and nothing else
    assert (result.returncode, result.stdout, result.stderr) == (3, "['told', '-x', 'y']\n", "")
    assert hit(trap) == ""


def test_nobody_starts_a_python_program_by_another_way():
    for path in [*ROOT.glob("Zorp/**/*.py"), *ROOT.glob("zorpctl/**/*.py")]:
        if path != ROOT / "Zorp/netfilter/children.py":
            assert not re.search(r'sys\.executable, "-', path.read_text()), path
