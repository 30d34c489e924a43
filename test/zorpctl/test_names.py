"""A line of instances.conf whose policy function has another name: NAME ... --as FUNCTION."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from test.support.host import PLUG
from test.zorpctl.test_lifecycle import serves
from Zorp.netfilter import policies

INTRA = PLUG.replace("$name", "intra")


def described(host) -> dict[str, object]:
    """What kzorp-setup gets of the instances of this host, by name."""
    found = {}
    for line in policies.read_instances(str(host.etc)).lines:
        child = policies.Child(line, [str(host.sbin / "zorp")])
        try:
            found[line.name] = child.result()
        finally:
            child.close()
    return found


def test_every_command_takes_the_name_of_the_line(host):
    # given a line whose function has another name
    port = host.instance("in-house", INTRA, "--as intra", "--num-of-processes 2")
    # when it is checked, started, looked at, reloaded: each calls it by the line's name, and finds it
    assert host.zorpctl("check").out.startswith("in-house: Policy is usable;")
    started = host.zorpctl("start", "in-house")
    assert started.out.splitlines() == ["Starting Zorp:", "in-house#0: Running", "in-house#1: Running"], started.err
    assert serves(port)
    assert sorted(path.name for path in host.pid_dir.glob("*.pid")) == ["zorp-in-house#0.pid", "zorp-in-house#1.pid"]
    assert host.zorpctl("status").out.startswith("in-house#0: running,")
    assert host.zorpctl("reload", "in-house").status == 0
    assert "\ninfo.instance: in-house\n" in host.zorpctl("szig", "in-house").out
    assert json.loads(host.zorpctl("explain", "--json", "in-house", "service", "in-house_plug").out)["instance"] == \
        "in-house"
    title = Path(f"/proc/{host.process('in-house#1').worker_pid()}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert title[:5] == [b"zorp", b"--slave", b"in-house#1", b"--state-dir", str(host.directory).encode()]
    assert title.count(b"--master") == 0
    # and stopped: nothing of it is left
    assert host.zorpctl("stop", "in-house").out.splitlines()[1:] == ["in-house#0: Stopped", "in-house#1: Stopped"]
    assert not serves(port)


def test_packet_rules_are_those_of_the_line(host):
    # given two lines with one function
    for name in ("in-house", "branch"):
        host.instance(name, INTRA, "--as intra")
    # then the description of each bears the name of its line
    assert {name: description.instance for name, description in described(host).items()} == {
        "in-house": "in-house", "branch": "branch"}


def test_a_program_started_by_hand_may_be_named_too(host):
    host.instance("intra")
    checked = subprocess.run(
        [str(host.sbin / "zorp"), "--as", "intra", "--master", "other#0", "--policy", str(host.etc / "intra.py"),
         "--check-policy"], capture_output=True, text=True, check=True)
    assert checked.stdout.startswith("other: Policy is usable;")
