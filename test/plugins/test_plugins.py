"""The Munin plugins and the Nagios check, against real instances."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from test.support.daemon import wait_until
from test.support.host import ROOT, Outcome

PLUGINS = ROOT / "plugins"
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")      # what munin takes as a name


@pytest.fixture
def plugin(host):
    """Run a plugin on this host: plugin("munin/zorp_thread", "config") -> Outcome; `link` is the name it is run by."""
    def run(name: str, *arguments: str, link: str = "") -> Outcome:
        path = PLUGINS / name
        if link:
            target, path = path, host.directory / link
            path.unlink(missing_ok=True)
            path.symlink_to(target)
        conf = str(host.etc / "zorpctl.conf")
        result = subprocess.run(
            [sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ZORPCTL_CONF": conf, "zorpctl_conf": conf})
        return Outcome(result.returncode, result.stdout, result.stderr)

    return run


def numbers(outcome: Outcome, key: str) -> dict[str, str]:
    """The fields of munin's lines FIELD.key VALUE."""
    lines = (line.partition(" ") for line in outcome.out.splitlines())
    found = {name.removesuffix(f".{key}"): value for name, _, value in lines if name.endswith(f".{key}")}
    assert all(_FIELD.fullmatch(field) for field in found)
    return found


def test_threads_for_munin(host, plugin):
    # given two processes that run, and an instance that does not
    host.instance("intra", zorpctl_args="--num-of-processes 2")
    host.instance("idle", zorpctl_args="--no-auto-start")
    host.zorpctl("start")
    # when munin asks for the labels and the values
    config, values = plugin("munin/zorp_thread", "config"), plugin("munin/zorp_thread")
    # then it gets a title, and a label and a number per running process
    assert "graph_title Zorp threads" in config.out.splitlines()
    assert numbers(config, "label") == {"intra_0": "intra#0", "intra_1": "intra#1"}
    assert all(int(value) > 0 for value in numbers(values, "value").values())
    assert numbers(values, "value").keys() == {"intra_0", "intra_1"}
    assert (config.status, values.status, config.err, values.err) == (0, 0, "", "")


@pytest.mark.parametrize(("kind", "node"), [("rss", "VmRSS"), ("vsz", "VmSize")])
def test_memory_for_munin(host, plugin, kind, node):
    host.instance("intra")
    host.zorpctl("start")
    # when munin asks by the name of the link
    config = plugin("munin/zorp_mem_", "config", link=f"zorp_mem_{kind}")
    values = numbers(plugin("munin/zorp_mem_", link=f"zorp_mem_{kind}"), "value")
    # then bytes come, near to what the kernel says now
    assert f"graph_title Zorp instances {kind.upper()} memory usage" in config.out
    assert numbers(config, "label") == {f"intra_0_{kind}": "intra#0"}
    with open(f"/proc/{host.process('intra#0').worker_pid()}/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith(node))
    assert 0.7 < int(values[f"intra_0_{kind}"]) / (kib * 1024) < 1.4


def test_what_munin_asks_before(host, plugin):
    assert plugin("munin/zorp_thread", "autoconf").out == "no (no instances)\n"
    host.instance("intra")
    assert plugin("munin/zorp_thread", "autoconf").out == "yes\n"
    assert plugin("munin/zorp_mem_", "suggest").out.split() == ["rss", "vsz"]
    assert plugin("munin/zorp_mem_").status == 1


def test_nagios_is_content_with_what_runs(host, plugin):
    # given a running instance, and one that is not meant to run
    host.instance("intra")
    host.instance("idle", zorpctl_args="--no-auto-start")
    host.zorpctl("start")
    # then all is well
    outcome = plugin("nagios/check_zorp_threads.py", "-v")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "OK"
    assert re.fullmatch(r"intra#0: \d+ of 1000 threads", lines[1])
    assert lines[2] == "idle#0: not running"


def test_nagios_hears_of_threads(host, plugin):
    # given instances with sessions near to their limits, in both spellings
    server = socket.create_server(("127.0.0.1", 0))
    ports = [host.instance(name, zorp_args=limit, server_port=server.getsockname()[1])
             for name, limit in (("few", "-t 12"), ("many", "--threads=100"))]
    host.zorpctl("start")
    clients = [socket.create_connection(("127.0.0.1", ports[0]), 10) for _ in range(11)]
    wait_until(lambda: host.zorpctl("conns", "few").out.count("session_id=") == 11, "the sessions")
    # then the first is in danger, the second is not
    outcome = plugin("nagios/check_zorp_threads.py")
    assert (outcome.status, outcome.out) == (2, "CRITICAL: few#0;\n")
    # and where the line is drawn is the administrator's choice
    warned = plugin("nagios/check_zorp_threads.py", "-w", "1", "-c", "99")
    assert (warned.status, warned.out) == (2, "CRITICAL: few#0; WARNING: many#0;\n")
    for client in clients:
        client.close()
    server.close()


def test_nagios_hears_of_what_does_not_run_or_answer(host, plugin):
    # given an instance that does not run, one that hangs, and a line that nobody understands
    host.instance("dead")
    host.instance("hung")
    host.zorpctl("start", "hung")
    process = host.process("hung#0")
    for pid in (process.worker_pid(), process.master_pid()):
        os.kill(pid, signal.SIGSTOP)
    with open(host.etc / "instances.conf", "a") as file:
        file.write("odd --policy 'x\n")
    # then all three are critical
    outcome = plugin("nagios/check_zorp_threads.py")
    assert outcome.status == 2
    assert re.match(r"CRITICAL: dead#0, hung#0, instances\.conf:3: ", outcome.out)


def test_nagios_without_configuration(host, plugin):
    (host.etc / "instances.conf").unlink()
    outcome = plugin("nagios/check_zorp_threads.py")
    assert (outcome.status, outcome.out.startswith("UNKNOWN No such file")) == (3, True)
    assert plugin("nagios/check_zorp_threads.py", "-w", "100").status == 3
    assert plugin("nagios/check_zorp_threads.py", "-h").status == 0
