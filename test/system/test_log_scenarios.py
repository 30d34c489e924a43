"""What a reader of the log finds, from real instances (logging.md, observable scenarios)."""

from __future__ import annotations

import contextlib
import re
import time

import pytest

from test.support.daemon import wait_until
from test.support.gateway import Server
from test.support.ports import free_port

POLICY = '''
from Zorp.Core import *
from Zorp.AnyPy import *
from Zorp.Plug import *

Zorp.firewall_name = "fw@site"

Zone("clients", ["127.0.0.0/30"])
Zone("servers", ["127.0.0.8/30"])

class Fails(PlugProxy):
    def config(self):
        PlugProxy.config(self)
        raise ValueError("by hand")

class Complains(PlugProxy):
    def config(self):
        raise UserException("bad")

class Logs(AnyPyProxy):
    def startup(self):
        log(None, "my.tag", 2, "hello; a='%d'", (5,))
        log("core.debug", 3, "x")
        log(None, "my.tag", 2, "bad; a='%d', b='%s'", ("x",))
        print("printed")
        self.client_stream.write("alive")

def intra():
    server = DirectedRouter(SockAddrInet("127.0.0.1", $server_port))
    Service("plug", PlugProxy, router=server)
    Service("single", PlugProxy, router=server, max_instances=1)
    Service("refused", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $closed_port)))
    Service("inside", PlugProxy, router=server, limit_target_zones_to="servers")
    Service("fails", Fails, router=server)
    Service("complains", Complains, router=server)
    Service("logs", Logs, router=server)
    for name, port in $ports.items():
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP), service=name)
'''
SERVICES = ("plug", "single", "refused", "inside", "fails", "complains", "logs")
# what parsers of every release look for (logging.md 12)
LINE = re.compile(r"^(?P<class>[a-z0-9]+\.[a-z0-9]+)\((?P<level>\d+)\): \((?P<session>.*?)\): "
                  r"(?P<text>[^;]*);?(?: (?P<fields>.*))?$")


@pytest.fixture(scope="module")
def server_port():
    """The port of an echo server."""
    with Server() as server:
        yield server.port


@pytest.fixture
def instance(zorp, server_port):
    """Make an instance with a service for each way that a connection may go."""
    return lambda **options: zorp(POLICY, server_port=server_port, closed_port=free_port(),
                                  ports={name: free_port() for name in SERVICES}, **options)


def talk(daemon, service: str, data: bytes = b"ping\n") -> bytes:
    """One connection to a service: what came back, as much as was sent at most."""
    with daemon.connect(daemon.values["ports"][service]) as client:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.sendall(data)
            while len(answer) < len(data) and (part := client.recv(65_536)):
                answer += part
        return answer


def summary(daemon, service: str):
    return daemon.log.wait_for("core.summary", 4, "Connection summary", f"svc/intra/{service}:0")


@pytest.mark.parametrize(("options", "verbosity", "starts", "summaries"), [
    ([], 3, 1, 1), ([], 2, 0, 1), (["--log-spec", ""], 3, 1, 0), (["--log-spec", "*.summary:4,core:2"], 6, 0, 1)])
def test_what_is_logged_at_which_level(instance, options, verbosity, starts, summaries):
    daemon = instance(verbosity=verbosity, arguments=options)
    assert talk(daemon, "plug") == b"ping\n"
    daemon.stop()                        # sessions that still end are told and log
    assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == starts
    assert len(daemon.log.find("core.summary", 4, "Connection summary")) == summaries
    assert len(daemon.log.find("core.accounting", 4, "accounting info", type="ZStreamFD")) == (
        2 if (starts and summaries) or (not starts and not options) else 0)


@pytest.mark.parametrize("spec", ["http.request:6,", "http_x:3"])
def test_a_bad_log_spec_stops_the_start(zorp, spec):
    daemon = zorp("from Zorp.Core import *\ndef intra(): pass\n", start=False, arguments=["--log-spec", spec])
    assert daemon.run() == 1
    assert daemon.log.find("core.error", 0, "Invalid logspec", logspec=spec)


def test_how_refused_connections_look(instance):
    daemon = instance(verbosity=3)
    # when a server refuses, a zone is not permitted, and one client is too many
    talk(daemon, "refused")
    assert summary(daemon, "refused").fields["verdict"] == "DENIED_BY_CONNECTION_FAIL"
    assert daemon.log.find("core.session", 3, "Server connection failure")
    talk(daemon, "inside")
    assert summary(daemon, "inside").fields["verdict"] == "DENIED_BY_POLICY"
    assert daemon.log.find("core.policy", 1, "Outbound connection not permitted", service="inside")
    assert daemon.log.find("core.policy", 1, "DAC policy violation")
    with daemon.connect(daemon.values["ports"]["single"]) as first:
        first.sendall(b"x")
        assert first.recv(1) == b"x"
        assert talk(daemon, "single") == b""
        line = daemon.log.wait_for("core.summary", 4, "Connection summary", "svc/intra/single:1")
        assert line.fields["verdict"] == "DENIED_BY_LIMIT"
        assert daemon.log.find("core.policy", 1, "Connection over permitted limits")


def test_what_policy_code_does_to_the_log(instance):
    daemon = instance(verbosity=3)
    # a traceback line by line, and the end of the session
    assert talk(daemon, "fails") == b""
    assert summary(daemon, "fails").fields["verdict"] == "ABORTED_BY_POLICY_ACTION"
    raw = [line.raw for line in daemon.log.find("core.error", 2)]
    assert any("Traceback: Traceback (most recent call last):" in line for line in raw)
    assert any("Traceback: ValueError: by hand" in line for line in raw)
    # an exception of Zorp is one line
    assert talk(daemon, "complains") == b""
    daemon.log.wait_for("core.error", 3, "Incorrect, or unspecified parameter", reason="bad")
    # all forms of log(), also a bad one, and the session lives
    assert talk(daemon, "logs") == b"alive"
    daemon.log.wait_for("my.tag", 2, "hello", a="5")
    daemon.log.wait_for("core.debug", 3, "x")
    daemon.log.wait_for("core.error", 3, "Unable to format log message")


def test_numbers_count_per_service_and_times_are_those_of_the_session(instance):
    # given one session that takes two seconds and another within it
    daemon = instance(verbosity=3)
    before = int(time.time())
    with daemon.connect(daemon.values["ports"]["plug"]) as long:
        long.sendall(b"x")
        assert long.recv(1) == b"x"
        for _ in range(2):
            talk(daemon, "plug")
        talk(daemon, "refused")
        short = daemon.log.wait_for("core.summary", 4, "Connection summary", "svc/intra/plug:2")
        told = time.time()
        wait_until(lambda: time.time() > told + 2, "two seconds")
    whole = summary(daemon, "plug")
    assert summary(daemon, "refused")
    # then each summary has its own times
    assert before <= int(whole.fields["session_start"]) <= int(short.fields["session_start"])
    assert int(whole.fields["session_end"]) - int(whole.fields["session_start"]) >= 2
    assert int(short.fields["session_end"]) < int(whole.fields["session_end"])


@pytest.mark.parametrize(("form", "ids"), [
    ("3", ("svc/plug:0", "svc/plug:0/plug")), ("short", ("svc/intra/plug:0", "svc/intra/plug:0/plug")),
    ("7", ("svc/intra/plug:0", "svc/intra/plug:0/intra/plug"))])
def test_forms_of_session_ids(instance, form, ids):
    daemon = instance(verbosity=5, arguments=["--session-id-format", form])
    talk(daemon, "plug")
    daemon.log.wait_for("core.summary", 4, "Connection summary", ids[0])
    assert daemon.log.find("core.session", 5, "Proxy starting", ids[1])


def test_dumps_show_both_directions(instance):
    # given level 9; when bytes pass, many enough for the kernel to move them at lower levels
    daemon = instance(verbosity=9)
    data = b"who: \x00\xff\r\n" + b"y" * 200_000
    assert talk(daemon, "plug", data) == data
    summary(daemon, "plug")
    dumped = [line.raw for line in daemon.log.find("core.dump", 9)]
    first = [line for line in dumped
             if "data line 0x0000: 77 68 6F 3A 20 00 FF 0D 0A 79 79 79 79 79 79 79  who: ....yyyyyyy" in line]
    # then they are there, read and written, on both sides
    assert len(first) == 4
    assert {"Reading stream", "Writing stream"} <= {line.text for line in daemon.log.find("core.dump", 7)}
    assert daemon.log.find("core.dump", 8, "Reading EOF on channel")


def test_every_line_is_what_parsers_expect(instance):
    # given every kind of session at the level that says most without dumps
    daemon = instance(verbosity=7)
    for _ in range(3):
        for service in SERVICES:
            talk(daemon, service, b"x'); verdict='ACCEPTED\r\ncore.summary(4): (svc/x:0): \x85\n")
    daemon.reload()
    talk(daemon, "plug")
    daemon.stop()
    lines = [raw[len("Nov 21 15:00:00 "):] for raw in daemon.log.text().splitlines() if re.match(r"\w{3} \d\d ", raw)]
    assert len(lines) > 100
    assert [line for line in lines if not LINE.match(line)] == [
        line for line in lines if line.startswith("core.info(3): Shutting down; version=")]
