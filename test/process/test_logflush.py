"""A backlog of log lines: written as fast as the receiver reads, and without turning in circles."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time

from Zorp.process.logflush import LogFlusher
from Zorp.process.logsinks import Formatter, StderrSink, SyslogSink
from Zorp.process.timers import Timers

LINES = 2000


class Loop:
    """The loop of a process, as far as a flusher sees it."""

    def __init__(self, sink) -> None:
        self.sink = sink
        self.selector = selectors.DefaultSelector()
        self.timers = Timers()
        self.flusher = LogFlusher(sink, self.selector, self.timers)
        self.turns = 0

    def run(self, until, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline_s
            self.turns += 1
            for key, events in self.selector.select(min(0.2, self.timers.timeout() or 0.2)):
                key.data(events)
            self.timers.run_due()


def fill(sink, lines: int = LINES) -> None:
    for number in range(lines):
        sink("core.info", 3, None, f"line; number='{number}'")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_backlog_goes_out_as_fast_as_it_is_read(tmp_path):
    # given a log that has not read for a while
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "log"))
        sink = SyslogSink(Formatter("classic", "intra"), str(tmp_path / "log"))
        fill(sink)
        loop = Loop(sink)
        before = descriptors()
        loop.flusher.flush()
        received = []

        def read() -> None:
            while len(received) < LINES:
                received.append(receiver.recv(1000))

        # when it reads again
        reader = threading.Thread(target=read, daemon=True)
        began_s = time.monotonic()
        reader.start()
        loop.run(lambda: not sink.waiting)
        reader.join(10)
        # then everything is there at once, in order, and nothing is left open
        assert time.monotonic() - began_s < 3
        assert [packet.split(b"'")[1] for packet in received] == [b"%d" % number for number in range(LINES)]
        assert descriptors() <= before
        assert not loop.selector.get_map()
        sink.close()


def test_a_log_that_does_not_read_costs_no_time(tmp_path):
    # given one that never reads
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "log"))
        sink = SyslogSink(Formatter("classic", "intra"), str(tmp_path / "log"))
        fill(sink)
        loop = Loop(sink)
        loop.flusher.flush()
        # when half a second goes by
        end_s = time.monotonic() + 0.5
        loop.run(lambda: time.monotonic() > end_s)
        # then the loop has turned for its timers only
        assert loop.turns < 30
        sink.close()


def test_a_log_that_comes_back_gets_what_waited(tmp_path):
    # given no log at all
    sink = SyslogSink(Formatter("classic", "intra"), str(tmp_path / "log"))
    fill(sink, 5)
    loop = Loop(sink)
    loop.flusher.flush()
    # when it comes
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "log"))
        loop.run(lambda: not sink.waiting)
        # then it gets everything
        assert b"number='0'" in receiver.recv(1000)
    sink.close()


def test_standard_error_that_is_a_full_pipe(tmp_path):
    # given a pipe that nobody reads
    read_end, write_end = os.pipe()
    sink = StderrSink(Formatter("classic", "intra"), write_end)
    fill(sink)
    loop = Loop(sink)
    loop.flusher.flush()
    assert sink.waiting
    # when somebody does
    received = bytearray()

    def read() -> None:
        while data := os.read(read_end, 65_536):
            received.extend(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    loop.run(lambda: not sink.waiting)
    os.close(write_end)
    reader.join(10)
    # then it is all there
    assert received.count(b"\n") == LINES
    os.close(read_end)
