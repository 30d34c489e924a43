"""Sinks: the forms of a packet, and what happens when nobody reads."""

import json
import os
import re
import socket
import threading

import pytest

from test.support.daemon import wait_until
from test.support.syslog import SyslogReceiver
from Zorp import Log
from Zorp.process import logsinks
from Zorp.process.logsinks import Formatter, StderrSink, SyslogSink, Throttle, severity_of

RECORD = ("core.session", 3, "svc/intra/x:0", "Starting proxy instance; client_fd='5'")


def test_the_packet_of_the_original():
    packet = Formatter("classic", "intra").syslog(*RECORD)
    assert re.fullmatch(
        r"<182>\w{3} [ \d]\d \d\d:\d\d:\d\d zorp/intra\[" + str(os.getpid()) + r"\]: "
        r"core\.session\(3\): \(svc/intra/x:0\): Starting proxy instance; client_fd='5'", packet)


def test_the_line_for_standard_error():
    assert re.fullmatch(r"\w{3} \d\d \d\d:\d\d:\d\d core\.session\(3\): \(svc/intra/x:0\): Starting .*",
                        Formatter("classic", "intra").plain(*RECORD))


def test_json_takes_the_fields_apart():
    record = json.loads(Formatter("json", "intra").plain(*RECORD))
    assert (record["tag"], record["level"], record["session"]) == RECORD[:3]
    assert record["message"] == "Starting proxy instance"
    assert record["fields"] == {"client_fd": "5"}


def test_rfc_5424():
    packet = Formatter("rfc5424", "intra").syslog(*RECORD)
    assert re.match(r"<182>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}[+-]\d\d:\d\d \S+ zorp/intra \d+ core\.session "
                    r'\[zorp@32473 level="3" session="svc/intra/x:0"\]\[fields@32473 client_fd="5"\] Starting', packet)


@pytest.mark.parametrize(("form", "line", "packet"), [
    ("classic", r"intra#0: Daemon exited; exitcode='9'",
     r"<26>\w{3} [ \d]\d [\d:]{8} supervise/intra#0\[\d+\]: Daemon exited; exitcode='9'"),
    ("rfc5424", r'1 \S+ \S+ zorp/intra \d+ core\.error \[zorp@32473 level="0" session="nosession"\]'
                r"\[fields@32473 exitcode=\"9\"\] Daemon exited; exitcode='9'",
     r'<26>1 \S+ \S+ supervise/intra#0 \d+ core\.error \[.*\] Daemon exited; .*'),
    ("json", r'\{"time": .* "tag": "core\.error", "level": 0, .* "fields": \{"exitcode": "9"\}, .*\}',
     r"<26>\w{3} [ \d]\d [\d:]{8} supervise/intra#0\[\d+\]: \{.*\}")])
def test_what_the_supervisor_says_has_the_form_of_the_log(form, line, packet):
    formatter = Formatter(form, "intra")
    text = "Daemon exited; exitcode='9'"
    assert re.fullmatch(line, formatter.supervisor_line("intra#0", text))
    assert re.fullmatch(packet, formatter.supervisor_packet("intra#0", text))


@pytest.fixture
def structured():
    """Formats what log() hands over the way the sinks do; settings are put back."""
    records = []
    Log.configure(sink=lambda *record: records.append(record), structured=True)
    yield lambda form: Formatter(form, "intra").plain(*records[-1])
    Log.configure()


HOSTILE = "o'brien\", x='y'\r\n\\]\x9b\u202e"


def test_json_carries_values_as_they_were(structured):
    Log.log("s", "smtp.policy", 3, "Denied; email='%s', size='%d'", (HOSTILE, 7))
    line = structured("json")
    record = json.loads(line)
    assert line.isprintable()
    assert record["fields"] == {"email": HOSTILE, "size": "7"}
    assert record["text"] == ("Denied; email='o<27>brien\", x=<27>y<27><0D><0A>\\]<C2><9B><E2><80><AE>', size='7'")


def test_json_shows_what_nobody_would_see(structured):
    Log.log("s", "smtp.policy", 3, "Denied; email='%s'", ("bob\x7f\u200b\U000e0041",))
    line = structured("json")
    assert r'"email": "bob\u007f\u200b\udb40\udc41"' in line
    assert json.loads(line)["fields"] == {"email": "bob\x7f\u200b\U000e0041"}


def test_values_without_quotes_of_their_own_forge_no_field(structured):
    Log.log("s", "core.error", 1, "Traceback: %s", ("verdict='ACCEPTED'",))
    record = json.loads(structured("json"))
    assert record["fields"] == {}
    assert record["text"] == "Traceback: verdict='ACCEPTED'"


def test_rfc_5424_has_the_fields_as_structured_data(structured):
    Log.log("svc/a]:0", "smtp.policy", 3, "Denied; email='%s', size='%d'", (HOSTILE, 7))
    line = structured("rfc5424")
    assert line.isprintable()
    assert (r'''[zorp@32473 level="3" session="svc/a\]:0"][fields@32473 email="o'brien\", x='y'<0D><0A>\\\]'''
            r'''<C2><9B><E2><80><AE>" size="7"] Denied; email='o<27>brien''') in line


@pytest.mark.parametrize(("tag", "level", "severity"), [
    ("core.debug", 0, 3), ("core.error", 1, 3), ("core.policy", 1, 4), ("http.violation", 1, 4), ("core.error", 2, 4),
    ("core.session", 3, 5), ("core.summary", 4, 6), ("core.session", 5, 6), ("core.debug", 6, 7), ("core.dump", 9, 7)])
def test_severities(tag, level, severity):
    assert severity_of(tag, level) == severity


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_both_kinds_of_sockets(tmp_path, kind):
    with SyslogReceiver(tmp_path / "log", kind) as receiver:
        sink = SyslogSink(Formatter("classic", "intra"), str(receiver.path))
        sink(*RECORD)
        sink("core.debug", 6, None, "x" * 9000)
        assert receiver.wait_for("Starting proxy instance").startswith("<182>")
        assert len(receiver.wait_for("xxx")) == logsinks.PACKET_BYTES - 1
        sink.close()


def test_what_cannot_be_sent_waits_and_what_does_not_fit_is_counted(tmp_path, monkeypatch):
    # given a receiver that does not read, and room for a few lines
    monkeypatch.setattr(logsinks, "MAX_WAITING_BYTES", 2000)
    woken = []
    with SyslogReceiver(tmp_path / "log", reading=False) as receiver:
        sink = SyslogSink(Formatter("classic", "intra"), str(receiver.path))
        sink.on_backlog = lambda: woken.append(True)
        # when a thousand lines are written
        for number in range(1000):
            sink("core.debug", 0, "s", f"line {number};")
        assert sink.waiting
        assert woken == [True]
        assert not sink.flush()
        # then, when it reads again, the lines that waited follow in order, and the count of the others
        received = []
        receiver._socket.settimeout(5)

        def take() -> bool:
            received.append(receiver._socket.recv(9000).decode())
            return sink.flush()

        wait_until(take, "room for the last line")
        receiver._socket.setblocking(False)
        while True:
            try:
                received.append(receiver._socket.recv(9000).decode())
            except BlockingIOError:
                break
        sink.close()
    numbers = [int(found[1]) for line in received if (found := re.search(r"line (\d+);", line))]
    dropped = int(re.search(r"Log messages dropped; count='(\d+)'", "".join(received))[1])
    assert numbers == list(range(len(numbers)))
    assert len(numbers) + dropped == 1000


def test_a_log_that_is_away_is_asked_once_a_second(tmp_path):
    # given no log at all, and a clock of our own
    now = [0.0]
    sink = SyslogSink(Formatter("classic", "intra"), str(tmp_path / "log"), lambda: now[0])
    sink(*RECORD)
    with SyslogReceiver(tmp_path / "log") as receiver:
        # when it comes, then it is noticed after the pause, and the line was kept
        assert not sink.flush()
        now[0] += 1.1
        assert sink.flush()
        receiver.wait_for("Starting proxy instance")
        sink.close()


def test_a_full_pipe_on_standard_error_delays_nobody():
    # given a pipe that nobody reads
    read_end, write_end = os.pipe()
    sink = StderrSink(Formatter("classic", "intra"), write_end)
    # when more is written than it holds
    for number in range(2000):
        sink("core.debug", 0, "s", f"line {number}; {'x' * 100}")
    # then the rest waits and follows
    assert sink.waiting
    received = b""
    while not sink.flush():
        received += os.read(read_end, 65_536)
    os.close(write_end)
    while data := os.read(read_end, 65_536):
        received += data
    os.close(read_end)
    assert [int(number) for number in re.findall(rb"line (\d+);", received)] == list(range(2000))


def test_a_throttle_lets_so_many_of_each_text_through():
    now = [0.0]
    throttle = Throttle(2, lambda: now[0])
    assert [throttle("a", "x") for _ in range(3)] == [True, True, False]
    assert throttle("a", "y")
    now[0] += 1
    assert throttle("a", "x")
    assert (throttle.take_held(), throttle.take_held()) == (1, 0)


def test_lines_held_back_come_in_one_write_and_in_their_order():
    # given a thread that has called hold() at a socket that keeps writes apart
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader.setblocking(False)
    sink = StderrSink(Formatter("classic", "intra"), writer.fileno())
    sink.hold()
    # when it writes
    for number in range(3):
        sink("core.accounting", 4, "s", f"line {number};")
    # then nothing is there before let_go(), others are not held up, and the lines come together, once
    with pytest.raises(BlockingIOError):
        reader.recv(65_536)
    other = threading.Thread(target=sink, args=("core.session", 3, "s", "of another thread;"))
    other.start()
    other.join()
    assert reader.recv(65_536).endswith(b"of another thread;\n")
    sink.let_go()
    sink.let_go()
    assert re.findall(rb"line (\d);\n", reader.recv(65_536)) == [b"0", b"1", b"2"]
    # and what follows is written at once again
    sink("core.session", 3, "s", "after it;")
    assert reader.recv(65_536).endswith(b"after it;\n")
    reader.close()
    writer.close()


def test_an_error_is_never_held_back():
    # given a line that is held back
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sink = StderrSink(Formatter("classic", "intra"), writer.fileno())
    sink.hold()
    sink("core.accounting", 4, "s", "first;")
    # when an error follows; then both are there
    sink("core.error", 2, "s", "second;")
    assert re.findall(rb"(first|second);\n", reader.recv(65_536)) == [b"first", b"second"]
    sink.let_go()
    reader.close()
    writer.close()
