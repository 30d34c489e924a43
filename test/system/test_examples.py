"""What is shipped as an example works as shipped."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from test.support.children import session_of
from test.support.daemon import wait_until
from Zorp.wire import instances_conf, zorpctl_conf

ROOT = pathlib.Path(__file__).resolve().parents[2]
ETC = ROOT / "etc/zorp"


@pytest.mark.parametrize("instance", ["mail", "news"])
def test_the_example_policy_loads(instance, tmp_path):
    # given the example policy and its zones in a directory of their own
    for name in ("policy.py", "zones.py"):
        shutil.copy(ETC / name, tmp_path)
    # when it is checked as the README says
    result = subprocess.run([sys.executable, str(ROOT / "sbin/zorp"), "--as", instance, "--policy",
                             str(tmp_path / "policy.py"), "--check-policy", "--no-syslog"],
                            capture_output=True, text=True, check=False, timeout=30)
    # then it is usable
    assert result.returncode == 0, result.stderr
    assert "Policy is usable" in result.stdout


def test_the_example_instances_are_lines_that_zorpctl_understands():
    text = (ETC / "instances.conf").read_text()
    lines = "\n".join(line.removeprefix("# ") for line in text.splitlines() if "--policy" in line)
    instances, problems = instances_conf.parse(lines, zorpctl_conf.parse((ETC / "zorpctl.conf").read_text()))
    assert [instance.name for instance in instances] == ["mail", "news"]
    assert problems == []


DEMO = [sys.executable, str(ROOT / "doc/demo/demo.py")]


def test_the_demo_shows_a_mail_that_passes_and_one_that_does_not():
    # given somebody who may not make namespaces
    result = subprocess.run(["setpriv", "--bounding-set", "-sys_admin", *DEMO], capture_output=True, text=True,
                            check=False, timeout=60)
    # then the mails are shown, and one line says what root would see
    assert result.returncode == 0, result.stdout + result.stderr
    assert "refused by the firewall: 554 Relaying denied." in result.stdout
    assert "one mail delivered, one refused" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("root sees a client, a firewall and a server")


@pytest.mark.netns
def test_the_demo_shows_root_what_client_firewall_and_server_see():
    result = subprocess.run(DEMO, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = result.stdout[result.stdout.index("# kzorp-setup load"):]
    # a mail in each family: client and server see each other
    for client, server in ((r"10\.1\.0\.2", r"10\.2\.0\.2"), (r"\[fd00:1::2\]", r"\[fd00:2::2\]")):
        assert re.search(rf"""
  client    {client}:\d+ talks with {server}:25
  firewall  {client}:\d+ -> {server}:25 \| proxy \| {client}:\d+ -> {server}:25, ACCEPTED
  server    has a mail from {client}:\d+
""", shown), shown
    # a forwarded connection: the server sees the firewall
    assert re.search(r"""
  client    10\.1\.0\.2:\d+ talks with 10\.2\.0\.2:7
  firewall  10\.1\.0\.2:\d+ -> 10\.2\.0\.2:7, Starting forwarded session
  server    10\.2\.0\.2:7 talks with 10\.2\.0\.1:\d+
""", shown), shown
    # a refused one: the server sees nothing
    assert "10.1.0.2 is told: Connection refused\n" in shown
    assert re.search(r"10\.2\.0\.2:23, Session denied\n  server    nobody came\n", shown), shown
    # in one screen
    assert len(shown.splitlines()) < 30


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_the_demo_leaves_nothing_behind_when_it_is_interrupted(number):
    # given a demo whose firewall runs
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          start_new_session=True, preexec_fn=heed_interrupts) as demo:
        assert any(line.startswith("# kzorp-setup load") for line in demo.stdout)
        inside = process_namespaces(session_of(demo.pid))
        assert inside
        # when it is interrupted
        os.kill(demo.pid, number)
        assert demo.wait(10) != 0
        # then it does not go on to its end
        assert "nobody has noticed" not in demo.stdout.read()
    # and its processes end, and the networks and mounts with them
    wait_until(lambda: not process_namespaces() & inside, "the end of the demo's processes")
    assert not {"client", "firewall", "server"} & {path.name for path in pathlib.Path("/run").glob("netns/*")}


def heed_interrupts() -> None:
    """In the child: what a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process_namespaces(pids: list[int] | None = None) -> set[str]:
    """Return the process namespaces, but ours, that these processes are in, or any."""
    found = set()
    for pid in pids if pids is not None else filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/pid"))
    return found - {os.readlink("/proc/self/ns/pid")}
