"""zorpctl metrics: what Prometheus reads, and where it may read it."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from test.support.daemon import wait_until
from test.support.host import ROOT
from test.support.ports import free_port
from zorpctl import metrics


def samples(text: str) -> dict[tuple, float]:
    """Every sample, by name and labels."""
    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture
def intra(host):
    """Two processes of an instance, and one instance that does not run."""
    host.port = host.instance("intra", zorpctl_args="--num-of-processes 2")
    host.instance("idle", zorpctl_args="--no-auto-start")
    assert host.zorpctl("start").status == 0
    return host


@pytest.fixture
def serving(host):
    """Serve the metrics on an address; everything ends with the test."""
    programs = []

    def serve(address: str) -> subprocess.Popen:
        programs.append(subprocess.Popen(
            [sys.executable, str(ROOT / "sbin/zorpctl"), "-c", str(host.etc / "zorpctl.conf"), "metrics",
             "--listen", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert programs[-1].stdout.readline() == f"Listening on {address}\n"
        return programs[-1]

    yield serve
    for program in programs:
        program.kill()
        program.communicate()


def test_every_process_is_there(intra):
    # given sessions that have ended
    with socket.create_connection(("127.0.0.1", intra.port), 10) as client:
        client.recv(1)
    wait_until(lambda: "service.intra_plug.session_number: 1" in intra.zorpctl("szig", "-r", "service").out,
               "the session in the statistics")
    # when the metrics are asked for
    outcome = intra.zorpctl("metrics")
    found = samples(outcome.out)
    # then what runs is up, with its figures, and what does not is down
    assert (outcome.status, outcome.err) == (0, "")
    assert {labels[0][1]: value for (name, *labels), value in found.items() if name == "zorp_up"} == {
        "intra#0": 1, "intra#1": 1, "idle#0": 0}
    process = ("process", "intra#0")
    assert found["zorp_threads_running", process] > 0
    assert found["zorp_policy_current", process] == 1
    assert found["zorp_resident_memory_bytes", process] > 1e6
    assert ("zorp_cpu_seconds_total", ("mode", "user"), process) in found
    assert sum(value for (name, *_labels), value in found.items() if name == "zorp_service_sessions_total") == 1
    assert not any(("process", "idle#0") in labels for (name, *labels) in found if name != "zorp_up")


def test_a_policy_that_is_not_reloaded_shows(intra):
    os.utime(intra.etc / "intra.py", (1, 1))
    assert samples(intra.zorpctl("metrics").out)["zorp_policy_current", ("process", "intra#1")] == 0


def test_a_hung_process_costs_its_timeout_only(intra):
    # given a process that does not answer
    process = intra.process("intra#0")
    os.kill(process.worker_pid(), signal.SIGSTOP)
    # then it is down, and the others are not
    found = samples(intra.zorpctl("metrics").out)
    assert (found["zorp_up", ("process", "intra#0")], found["zorp_up", ("process", "intra#1")]) == (0, 1)


@pytest.mark.parametrize("host_name", ["127.0.0.1", "[::1]"])
def test_loopback(intra, serving, host_name):
    port = free_port()
    serving(f"{host_name}:{port}")
    with urlopen(f"http://{host_name}:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert samples(answer.read().decode())["zorp_up", ("process", "intra#0")] == 1
    # when an instance goes, the next scrape knows
    intra.zorpctl("stop", "intra")
    with urlopen(f"http://{host_name}:{port}/metrics", timeout=10) as answer:
        assert samples(answer.read().decode())["zorp_up", ("process", "intra#0")] == 0


def test_a_unix_socket(intra, serving):
    path = intra.directory / "metrics"
    for _start in range(2):
        program = serving(f"unix:{path}")
        # then the socket is for owner and group
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert "zorp_up" in answer.read().decode()
        connection.close()
        # and one that was left behind is replaced
        program.kill()
        program.wait()


def test_a_client_that_says_nothing_is_sent_away(intra, serving):
    # given one that connects and waits
    port = free_port()
    serving(f"127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port), 20) as silent:
        # then the next is served after a few seconds
        with urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert answer.status == 200
        assert silent.recv(100) == b""


@pytest.mark.parametrize("address", ["0.0.0.0:9363", "192.0.2.1:9363", "[::]:9363", "localhost:9363", "9363",
                                     "127.0.0.1:x", "127.0.0.1:99999"])
def test_only_this_host_may_ask(host, address):
    host.instance("intra")
    outcome = host.zorpctl("metrics", "--listen", address)
    assert outcome.status == 1
    assert re.search(r"give unix:PATH, or a loopback address", outcome.err)


def test_an_address_in_use(host):
    host.instance("intra")
    with socket.create_server(("127.0.0.1", 0)) as other:
        outcome = host.zorpctl("metrics", "--listen", f"127.0.0.1:{other.getsockname()[1]}")
    assert (outcome.status, "Address already in use" in outcome.err) == (1, True)
    file = host.directory / "file"
    file.write_text("mine")
    assert host.zorpctl("metrics", "--listen", f"unix:{file}").status == 1
    assert file.read_text() == "mine"


def test_without_prometheus_client(monkeypatch):
    monkeypatch.setattr(metrics, "prometheus_client", None)
    with pytest.raises(metrics.MetricsError, match=r"install python3-prometheus-client"):
        metrics.text(list)
