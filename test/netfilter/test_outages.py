"""The daemon killed, started again and reloaded while clients connect: nothing passes by it, nothing fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections import Counter

import pytest

from test.support.children import session_of
from test.support.daemon import Daemon, wait_until
from test.support.kzorpd import Kzorpd
from test.support.leaks import Capture, connected
from test.support.net import SERVER, SERVER6, net

__all__ = ["net"]
pytestmark = pytest.mark.netns

POLICY = """
from Zorp.Core import *
from Zorp.Plug import *

config.options.rule_listen_port = 50080
Zone("clients", ["10.1.0.0/24", "fd00:1::/64"])

def intra():
    Service("web", PlugProxy)
    Service("mail", PlugProxy, router=TransparentRouter(forge_addr=TRUE))
    PFService("fwd")
    Rule(rule_id=1, proto=6, dst_port=(80, 8080), src_zone="clients", service="web")
    Rule(rule_id=2, proto=6, dst_port=25, src_zone="clients", service="mail")
    Rule(rule_id=3, proto=6, dst_port=(700, 7000), src_zone="clients", service="fwd")
"""
FAMILIES = (SERVER, SERVER6)
PROXIED = [(address, port) for address in FAMILIES for port in (25, 80)]
FORWARDED = [(address, 700) for address in FAMILIES]
LASTING = [(address, port) for address in FAMILIES for port in (8080, 7000)]
RELOADS = 20
_BETWEEN_S = 0.02                # reloads shall have a processor, too


@pytest.fixture(params=("nft", "legacy-restore"))
def backend(request, net):
    """Both kinds of iptables, and a server that greets everybody and listens."""
    net.firewall.configure(request.param)
    for address, port in PROXIED + FORWARDED:
        net.server.listen(address, port).answer_all(b"hello")
    return request.param


def packet_rules(firewall) -> tuple[list[str], list[int]]:
    """Return our packet rules, and how many packets each has met: loading them again begins at 0."""
    found = []
    for family in ("ip", "ip6"):
        kind = "nft" if firewall.backend == "nft" else "legacy"
        saved = firewall.run(f"{family}tables-{kind}-save", "-c").stdout
        found += re.findall(r"^\[(\d+):\d+\] (.*ZORP.*)$", saved, re.M)
    return [rule for _, rule in found], [int(packets) for packets, _ in found]


def test_without_the_daemon_nothing_passes_and_with_it_the_rules_serve_on(net, backend):
    # given an instance of two processes, which serves
    daemon = net.firewall.start_zorp(POLICY, arguments=("--num-of-processes", "2"))
    # (by the servers themselves: no SYN waits for its neighbour any more when the processes die)
    for target in PROXIED:
        with net.client.connect(*target) as client:
            assert client.recv(5) == b"hello"
    rules, packets = packet_rules(net.firewall)
    stored = (net.firewall.directory / "packet-rules.json").stat()
    # and a client in the middle of its session
    with net.client.connect(SERVER, 80) as client, Capture(net.server) as capture:
        assert client.recv(5) == b"hello"
        # when all of its processes are killed
        family = session_of(daemon.pid)
        assert len(family) == 3
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        daemon.wait()
        wait_until(lambda: not session_of(daemon.pid), "the end of the workers")
        capture.arrived()                # the kernel's farewell to the server
        # then two hundred attempts reach nobody, and no packet of them gets through
        with contextlib.suppress(OSError):
            client.sendall(b"still there?")
        assert connected(net.client, PROXIED, times=50, within_s=1.2) == []
        # (the kernel goes on to say farewell for the connections of the dead)
        assert [packet for packet in capture.arrived() if packet.opens_or_speaks] == []
        # and what needs no daemon is served
        assert connected(net.client, FORWARDED, within_s=2) == FORWARDED
    # when the instance is started again
    mark = daemon.log.mark()
    daemon.launch()
    daemon.log.wait_for("core.info", 4, "Accepting connections", after=mark, count=2)
    # then clients are served, by the rules that were there all the time
    assert connected(net.client, PROXIED, times=5, within_s=2) == PROXIED
    rules_after, packets_after = packet_rules(net.firewall)
    assert rules_after == rules
    assert all(after >= before for after, before in zip(packets_after, packets, strict=True))
    assert sum(packets) > 0
    assert (net.firewall.directory / "packet-rules.json").stat() == stored


class Stream:
    """Clients that connect one after the other, to each target in turn; for `with`."""

    def __init__(self, client, targets) -> None:
        self._client, self._targets = client, targets
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.served: Counter = Counter()
        self.failed: list = []

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            for target in self._targets:
                self._is_over.wait(_BETWEEN_S)
                try:
                    # a SYN that is lost is sent again after a second: whoever needs that has noticed
                    with self._client.connect(*target, timeout_s=0.9) as client:
                        assert client.recv(5) == b"hello"
                    self.served[target] += 1
                except (OSError, AssertionError) as problem:
                    self.failed.append((target, repr(problem)))


@pytest.mark.parametrize("backend", ["nft", pytest.param("legacy-restore", marks=pytest.mark.soak)], indirect=True)
def test_twenty_reloads_of_packet_rules_and_daemon_fail_no_connection(net, backend):
    # given kzorpd and an instance that hands its rules over
    kzorpd = Kzorpd(net.firewall.directory, net.firewall)
    kzorpd.configure(f"backend: {backend}")
    daemon = Daemon(net.firewall.directory, POLICY, verbosity=4, arguments=("--packet-rules", "kzorpd"))
    daemon.prefix = ("ip", "netns", "exec", net.firewall.name)
    with contextlib.ExitStack() as stack:
        stack.callback(kzorpd.end)
        kzorpd.start()
        stack.callback(daemon.end)
        daemon.start()
        # and connections that are there all the time, and clients that come all the time
        lasting = []
        for target in LASTING:
            server = net.server.listen(*target)
            client = stack.enter_context(net.client.connect(*target))
            lasting.append((client, stack.enter_context(server.accept()[0])))
        stream = stack.enter_context(Stream(net.client, PROXIED + FORWARDED))
        # when kzorpd and the instance reload at the same time, with another rule each time
        for number in range(RELOADS):
            reading = subprocess.Popen(kzorpd.words("kzorpd", "--reload"))
            daemon.reload(POLICY + f'    Rule(rule_id=9, proto=6, dst_port={9_000 + number}, service="fwd")\n')
            assert reading.wait(30) == 0
            assert any(f"--dport {9_000 + number} " in rule for rule in packet_rules(net.firewall)[0])
        # then nobody who was there has noticed
        for client, connection in lasting:
            client.sendall(b"still there?")
            assert connection.recv(12) == b"still there?"
    # and nobody who came
    assert stream.failed == []
    assert min(stream.served[target] for target in PROXIED + FORWARDED) >= RELOADS
