"""Closed from the first packet: what kzorp-setup.service does on a host whose kernel holds nothing yet."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from test.support.daemon import ROOT, wait_until
from test.support.leaks import Capture, connected
from test.support.net import SERVER, SERVER6, Namespace, net
from Zorp.netfilter import policies

__all__ = ["net"]
pytestmark = pytest.mark.netns

UNIT = ROOT / "systemd" / "kzorp-setup.service"
POLICY = """
from Zorp.Core import *
from Zorp.Plug import *

config.options.rule_listen_port = 50080

def intra():
    Service("web", PlugProxy)
    PFService("fwd")
    Rule(proto=6, dst_port=(80, 25), service="web")
    Rule(proto=6, dst_port=700, service="fwd")
"""
PROXIED = [(address, port) for address in (SERVER, SERVER6) for port in (25, 80)]
FORWARDED = [(address, 700) for address in (SERVER, SERVER6)]
NO_RULE = [(address, 81) for address in (SERVER, SERVER6)]


def unit_lines(key: str) -> list[str]:
    """Return the values of a key of the unit, in order."""
    return [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.partition("=")[0] == key]


class Host:
    """The firewall as a machine that is switched on: files from an earlier life, an empty kernel, links down."""

    def __init__(self, net) -> None:
        self.net, self.directory = net, net.firewall.directory
        self.daemon = net.firewall.add_zorp(POLICY)
        self.store = self.directory / "packet-rules.json"
        self.links("down")
        for address, port in PROXIED + FORWARDED + NO_RULE:
            net.server.listen(address, port).answer_all(b"hello")

    def live_once(self) -> None:
        """Load packet rules into a kernel that goes away again; the store remains."""
        self.net.firewall.write_settings()
        up = "ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
        load = shlex.join(self._program("kzorp-setup", "load"))
        result = subprocess.run(["unshare", "-n", "sh", "-c", f"{up}; {load}"], capture_output=True, text=True,
                                timeout=60, check=False)
        assert result.returncode == 0, result.stderr

    def links(self, state: str) -> None:
        """Take the network away, or bring it up with its addresses."""
        firewall = self.net.firewall
        for number, device in enumerate(("fc", "fs"), start=1):
            firewall.run("ip", "link", "set", device, state)
            if state == "up":
                firewall.run("ip", "-6", "addr", "replace", f"fd00:{number}::1/64", "dev", device, "nodad")
        if state == "up":
            for namespace, number in ((self.net.client, 1), (self.net.server, 2)):
                for address in (f"10.{number}.0.1", f"fd00:{number}::1"):
                    wait_until(functools.partial(answers, namespace, address), f"{address} for {namespace.name}")

    def boot(self, program: str = "") -> subprocess.CompletedProcess:
        """Do what the unit says, with the rights it gives; return what became of its last line.

        program: what to run in place of that line's, a text in Python.
        """
        guard, = unit_lines("ExecStartPre")
        assert guard.startswith("-"), "a failure of the first step must not keep the second from being taken"
        self._as_the_unit(*self._words(guard[1:]))
        line, = unit_lines("ExecStart")
        words = self._words(line)
        return self._as_the_unit(*([sys.executable, "-c", program, *words[2:]] if program else words))

    def _words(self, line: str) -> list[str]:
        program, *arguments = shlex.split(line)
        return self._program(Path(program).name, *arguments)

    def _as_the_unit(self, *words: str) -> subprocess.CompletedProcess:
        rights = unit_lines("CapabilityBoundingSet")[0].lower().replace("cap_", "+").replace(" ", ",")
        return self.alone("setpriv", "--bounding-set", f"-all,{rights}", *words)

    def alone(self, *words: str) -> subprocess.CompletedProcess:
        """Run a command that finds no kzorpd in the directories that count when kzorp.yml cannot be read.

        They are those of the machine that the tests run on, where there may well be one.
        """
        empty = 'mount -t tmpfs none /run && mount -t tmpfs none /var/lib && exec "$@"'
        return self.net.firewall.run("sh", "-c", empty, "sh", *words, check=False)

    def _program(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "sbin" / name), "--config-dir", str(self.directory), *arguments]


def answers(namespace: Namespace, address: str) -> bool:
    with contextlib.suppress(OSError):
        namespace.ping(address, timeout_s=0.3)
        return True
    return False


@pytest.fixture
def host(net):
    """A host with a good policy and no store; nothing of ours is in its kernel."""
    made = Host(net)
    made.net.firewall.write_settings()
    assert kernel_state(net.firewall) == ""
    return made


def kernel_state(firewall: Namespace) -> str:
    """Return the rules, sets and policy routing that a kernel does not have by itself."""
    commands = [f"{family}tables-{kind}-save" for family in ("ip", "ip6") for kind in ("nft", "legacy")]
    found = [line for command in commands for line in firewall.run(command).stdout.splitlines() if line[:1] == "-"]
    found += firewall.run("ipset", "save").stdout.splitlines()
    for family in ("-4", "-6"):
        found += [line for line in firewall.run("ip", family, "rule").stdout.splitlines() if "fwmark" in line]
        found += firewall.run("ip", family, "route", "show", "table", "100", check=False).stdout.splitlines()
    return "\n".join(found)


def break_policy(host: Host) -> None:
    host.daemon.write_policy(POLICY + "    Rule(service='nobody')\n")


def break_instances(host: Host) -> None:
    (host.directory / "instances.conf").write_text("intra --policy 'unfinished\n")


def break_settings(host: Host) -> None:
    (host.directory / "kzorp.yml").write_text("backend: [\n")


def settings(text: str):
    """Return the fault of a kzorp.yml with this text."""
    def write(host: Host) -> None:
        (host.directory / "kzorp.yml").write_text(text + "\n")
    return write


def nul_in_instances(host: Host) -> None:
    (host.directory / "instances.conf").write_text("intra --policy un\0usable\n")


def open_the_site(host: Host) -> None:
    host.net.firewall.more_settings = "default_deny: false\n"
    host.net.firewall.write_settings()


def break_store(host: Host) -> None:
    host.store.write_text('{"version": 1, "instances": [{"descr')


def pipe_in_place_of_store(host: Host) -> None:
    host.store.unlink(missing_ok=True)
    os.mkfifo(host.store)
    os.mkfifo(f"{host.store}.new")


def infinity_in_store(host: Host) -> None:
    host.store.write_text('{"version":1,"instances":[],"indexes":{"last":Infinity,"indexes":{}}}')


def directory_in_place_of_lock(host: Host) -> None:
    host.store.with_name("packet-rules.lock").mkdir()


# what there was before, what is wrong, and what may pass from the first packet
BOOTS = {
    "good store": (True, (), FORWARDED, ""),
    "no store": (False, (), FORWARDED, ""),
    "broken store": (True, (break_store,), FORWARDED, ""),
    "broken policy": (True, (break_policy,), FORWARDED, "No valid service was specified"),
    "broken instances.conf": (True, (break_instances,), FORWARDED, "instances.conf"),
    "broken policy, no store": (False, (break_policy,), [], "no packet rules are stored"),
    "broken policy, broken store": (True, (break_policy, break_store), [], "no packet rules are stored"),
    "broken policy, no store, open site": (False, (break_policy, open_the_site), [], "No valid service"),
    "broken kzorp.yml": (True, (break_settings,), [], "kzorp.yml:2: not YAML"),
    "families in a list": (True, (settings("families: [[4, 6]]"),), [], "families: [4], [6] or [4, 6]"),
    "a month without name": (True, (settings("routing_table: 2026-13-45"),), [], "routing_table: not YAML: ValueError"),
    "a number without digits": (True, (settings("nflog_group: !!int ''"),), [], "nflog_group: not YAML: IndexError"),
    "NUL in kzorp.yml": (True, (settings("user: a\0b"),), [], "kzorp.yml:1: not YAML: character 0x0"),
    "NUL in instances.conf": (True, (nul_in_instances,), FORWARDED, "no word can have a byte of value 0"),
    "pipe for a store": (False, (pipe_in_place_of_store,), FORWARDED, ""),
    "pipe for a store, broken policy": (
        False, (pipe_in_place_of_store, break_policy), [], "no packet rules are stored"),
    "infinity in the store": (False, (infinity_in_store,), FORWARDED, ""),
    "infinity in the store, broken policy": (
        False, (infinity_in_store, break_policy), [], "no packet rules are stored"),
    "directory for the lock": (False, (directory_in_place_of_lock,), [], "Cannot lock the state"),
    "NUL in instances.conf, no store": (False, (nul_in_instances,), [], "no packet rules are stored"),
}
CASES = [pytest.param("nft", *boot, id=f"nft, {name}") for name, boot in BOOTS.items()] + [
    pytest.param("legacy-restore", *BOOTS[name], id=f"legacy-restore, {name}")
    for name in ("good store", "broken policy", "broken policy, no store")]


@pytest.mark.parametrize(("backend", "has_store", "faults", "passing", "complaint"), CASES)
def test_nothing_of_a_proxied_service_leaks_from_the_first_packet_on(
        host, backend, has_store, faults, passing, complaint):
    # given a host as it was left, with this wrong, switched on
    host.net.firewall.backend = backend
    host.net.firewall.write_settings()
    if has_store:
        host.live_once()
    for fault in faults:
        fault(host)
    with Capture(host.net.server) as capture:
        assert connected(host.net.client, PROXIED + FORWARDED, within_s=0.1) == []
        # when the unit runs, and then the network comes up
        result = host.boot()
        host.links("up")
        # then it fails if something was wrong, with the reason
        assert result.returncode == bool(complaint), result.stderr
        assert complaint in result.stderr
        # and only what a policy forwards is forwarded
        assert connected(host.net.client, PROXIED + FORWARDED + NO_RULE, times=3, within_s=0.5) == passing
        assert capture.arrived(25, 80, 81) == []
    # and as soon as the instance serves, with its policy mended, so do the rules that were loaded
    if passing:
        before = kernel_state(host.net.firewall)
        host.daemon.write_policy(POLICY)
        host.daemon.start()
        assert connected(host.net.client, PROXIED, within_s=2) == PROXIED
        assert kernel_state(host.net.firewall) == before


# where boot is killed, and what has to be true of the call
MOMENTS = {
    "as it begins": ("setup_cli._boot", "True"),
    "as it loads policies": ("setup_cli.policies.describe", "True"),
    "before the first table": ("backend.RestoreWriter.write", "True"),
    "before the last table": ("backend.RestoreWriter.write",
                              "(given[1].table.family, given[1].table.name) == (6, 'mangle')"),
    "as the rules are there": ("backend.Backend._remove_others", "True"),
}


@pytest.mark.parametrize(("backend", "moments"), [("nft", MOMENTS), ("legacy-restore", ["before the last table"])],
                         ids=["nft", "legacy-restore"])
def test_whenever_boot_is_killed_nothing_reaches_a_server_and_the_next_start_serves(host, backend, moments):
    host.net.firewall.backend = backend
    host.net.firewall.write_settings()
    host.links("up")
    for moment in moments:
        # given an empty kernel
        host.net.firewall.setup("unload")
        assert kernel_state(host.net.firewall) == "", moment
        with Capture(host.net.server) as capture:
            # when the unit starts, and boot is killed
            assert host.boot(killed_at(*MOMENTS[moment])).returncode == -signal.SIGKILL, moment
            # then nobody is served by the servers behind
            assert connected(host.net.client, PROXIED + NO_RULE, times=2, within_s=0.3) == [], moment
            assert capture.arrived(25, 80, 81) == [], moment
    # and the next start puts everything in force
    assert host.boot().returncode == 0
    assert connected(host.net.client, FORWARDED, within_s=2) == FORWARDED
    assert host.net.firewall.setup("status").stdout == "in force\n"


@pytest.mark.parametrize("backend", ["nft", "legacy-restore"])
def test_a_boot_that_is_killed_between_tables_leaves_an_open_site_closed_for_what_is_proxied(host, backend):
    # given a site that forwards what no rule takes
    host.net.firewall.backend = backend
    open_the_site(host)
    host.links("up")
    for family, table in ((4, "mangle"), (6, "mangle"), (6, "filter")):
        host.net.firewall.setup("unload")
        condition = f"(given[1].table.family, given[1].table.name) == ({family}, {table!r})"
        with Capture(host.net.server) as capture:
            # when boot is killed before it writes this table
            assert host.boot(killed_at("backend.RestoreWriter.write", condition)).returncode == -signal.SIGKILL
            # then nothing of what a rule takes reaches the servers
            assert connected(host.net.client, PROXIED, times=2, within_s=0.3) == [], (family, table)
            assert capture.arrived(25, 80) == [], (family, table)
    # and the next start lets pass what the site wants
    assert host.boot().returncode == 0
    assert connected(host.net.client, PROXIED + NO_RULE, within_s=1) == NO_RULE


def killed_at(place: str, condition: str) -> str:
    """Return kzorp-setup as a program that ends itself by force where it comes to this function."""
    return (f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom Zorp.netfilter import backend, setup_cli\n"
            f"real = {place}\n"
            f"{place} = lambda *given: os.kill(os.getpid(), 9) if {condition} else real(*given)\n"
            "sys.exit(setup_cli.main())")


def test_guard_leaves_rules_that_are_there_alone(host):
    # given rules in force
    host.net.firewall.setup("load")
    before = kernel_state(host.net.firewall)
    # when the unit is started again, then its first step changes nothing
    host.net.firewall.setup("guard")
    assert kernel_state(host.net.firewall) == before


@pytest.mark.parametrize("state", ["without sets", "one family"])
def test_guard_needs_little_of_the_kernel(host, state):
    # given a kernel that cannot do what most of the rules need
    fault = {"without sets": "backend.Sets = fault",
             "one family": "backend.RestoreWriter.read = lambda *given: (real if given[1] == 4 else fault)(*given)"}
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom Zorp.netfilter import backend, setup_cli\n"
               "def fault(*given): raise backend.TableError('no such thing in this kernel')\n"
               f"real = backend.RestoreWriter.read\n{fault[state]}\nsys.exit(setup_cli.main())")
    # when the host starts
    result = host.boot(program)
    host.links("up")
    # then it says what is missing, and what can be closed is closed
    assert result.returncode == 1
    assert "no such thing in this kernel" in result.stderr
    assert connected(host.net.client, [target for target in PROXIED if "." in target[0]], within_s=0.3) == []


def test_policies_are_what_the_kernel_ends_first_when_memory_runs_out(tmp_path):
    # given a policy that is being loaded
    (tmp_path / "instances.conf").write_text("intra --policy policy.py\n")
    line, = policies.read_instances(str(tmp_path)).lines
    child = policies.Child(line, command=[sys.executable, "-c", "import time; time.sleep(60)"])
    with contextlib.closing(child):
        # then it is more dispensable than the program that loads it, which the unit keeps longest
        facts = dict(line.split(":") for line in Path(f"/proc/self/fdinfo/{child.descriptor}").read_text().splitlines())
        assert int(Path(f"/proc/{int(facts['Pid'])}/oom_score_adj").read_text()) > 0
    assert int(unit_lines("OOMScoreAdjust")[0]) < 0


STEPS = {"of the settings": ("read_file",), "of the policies": ("policies.read_instances",),
         "of the compiler and the store": ("Store.read", "policies.describe")}


@pytest.mark.parametrize("broken", STEPS.values(), ids=STEPS)
def test_a_defect_of_any_part_closes_the_host(host, broken):
    # given a program with a defect: these parts end with an exception that nobody foresaw
    faults = "".join(f"setup_cli.{name} = fault\n" for name in broken)
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
               "from Zorp.netfilter import setup_cli\n"
               "def fault(*given): raise ZeroDivisionError('defect')\n"
               f"{faults}sys.exit(setup_cli.main())")
    # when the host is switched on
    result = host.alone(sys.executable, "-c", program, "--config-dir", str(host.directory), "boot")
    host.links("up")
    # then it is closed, and says why without a traceback
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "kzorp-setup: boot: ZeroDivisionError: defect" in result.stderr
    assert connected(host.net.client, PROXIED + FORWARDED + NO_RULE, within_s=0.3) == []


def test_a_host_that_closed_itself_opens_when_its_policy_is_mended(host):
    # given a host that closed itself
    break_policy(host)
    assert host.boot().returncode == 1
    assert "closed: nothing is forwarded" in host.boot().stdout
    host.links("up")
    assert connected(host.net.client, FORWARDED) == []
    # when the policy is right and loaded
    host.daemon.write_policy(POLICY)
    host.net.firewall.setup("load")
    # then what it forwards passes
    assert connected(host.net.client, FORWARDED, within_s=2) == FORWARDED


def test_without_the_unit_everything_would_pass(host):
    # given an empty kernel with the network up: these attempts can leak, so the others prove something
    host.links("up")
    with Capture(host.net.server) as capture:
        assert connected(host.net.client, PROXIED, within_s=2) == PROXIED
        assert {(packet.destination, packet.port) for packet in capture.arrived()} == set(PROXIED)


def test_a_host_with_listeners_only_is_left_alone(host):
    (host.directory / "kzorp.yml").write_text("mode: listeners\n")
    assert host.boot().returncode == 0
    assert kernel_state(host.net.firewall) == ""


def test_the_unit_comes_before_the_network_and_is_asked_for_at_boot():
    assert "network-pre.target" in unit_lines("Before")[0].split()
    assert unit_lines("Wants") == ["network-pre.target"]
    assert unit_lines("DefaultDependencies") == ["no"]
    assert unit_lines("WantedBy") == ["sysinit.target"]
