"""The server of lines: turns, bounds, patience, over real sockets."""

import contextlib
import errno
import os
import selectors
import socket

import pytest

from test.support.logged import captured_log
from Zorp.process.line_server import (
    PAUSE_S,
    REQUESTS_PER_TURN,
    SPARED,
    LineClient,
    LineServer,
    Patience,
    listening_socket,
)
from Zorp.process.timers import Timers

LINE_BYTES = 100
PATIENCE = Patience(request=30.0, reader=10.0)


class Echo(LineClient):
    """Answers a line with itself; "later" never, "last" for the last time."""

    def __init__(self, server, sock, world) -> None:
        super().__init__(server, sock, LINE_BYTES, PATIENCE)
        self.world = world

    def take(self, line: bytes) -> None:
        self.world.taken += 1
        if line == b"later":
            self.answer_within(5.0)
            return
        if line == b"last":
            self.last_answer()
        if line == b"defect":
            raise RuntimeError("a defect of ours")
        self.answer(line + b"\n")

    def fail(self, step: str, problem: str) -> None:
        self.world.failures.append((step, problem))


class World:
    """A loop with a server on a socket, and a clock that the test moves."""

    def __init__(self, directory, connections=4) -> None:
        self.now_s = 100.0
        self.taken, self.failures = 0, []
        self.selector, self.timers = selectors.DefaultSelector(), Timers(lambda: self.now_s)
        self.server = LineServer(self.selector, self.timers, connections)
        self.path = directory / "sock"
        descriptor = os.open(directory, os.O_RDONLY)
        self.server.serve(listening_socket(descriptor, "sock", 16), lambda sock: Echo(self.server, sock, self))
        os.close(descriptor)
        self.clients = []

    def client(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        sock.settimeout(5)
        self.clients.append(sock)
        self.turn()
        return sock

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            for key, events in self.selector.select(min(self.timers.timeout() or 0, 0)):
                key.data(events)
            self.timers.run_due()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.timers.run_due()

    def close(self) -> None:
        self.server.close()
        for client in self.clients:
            client.close()
        self.selector.close()


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.close()


def test_a_client_that_floods_gets_its_turn_and_no_more(world):
    # given a client that sends nothing but newlines, more than a turn's worth
    flooding, other = world.client(), world.client()
    flooding.sendall(b"\n" * 20_000)
    world.turn()
    assert world.taken <= 2 * REQUESTS_PER_TURN      # one by the socket, one by the timer
    # when somebody else asks
    other.sendall(b"hello\n")
    world.turn()
    # then it is answered in that turn, and everything else in later ones
    assert other.recv(100) == b"hello\n"
    answers = b""
    flooding.setblocking(False)
    for _ in range(2 * 20_000 // REQUESTS_PER_TURN):
        world.turn()
        with contextlib.suppress(BlockingIOError):
            answers += flooding.recv(1 << 20)
    assert answers == b"\n" * 20_000


def test_lines_in_pieces_and_lines_together(world):
    client = world.client()
    for piece in (b"o", b"ne\ntw", b"o\n\nfour\n"):
        client.sendall(piece)
        world.turn()
    assert client.recv(100) == b"one\ntwo\n\nfour\n"


def test_the_longest_line_passes_and_a_longer_one_ends_the_connection(world):
    good, bad = world.client(), world.client()
    good.sendall(b"x" * LINE_BYTES + b"\n")
    bad.sendall(b"x" * (LINE_BYTES + 1))
    world.turn()
    assert good.recv(1000) == b"x" * LINE_BYTES + b"\n"
    assert bad.recv(1000) == b""
    assert world.failures == [("read", f"line of more than {LINE_BYTES} bytes")]


def test_who_sends_nothing_and_who_gets_no_answer_are_closed_in_time(world):
    silent, waiting = world.client(), world.client()
    waiting.sendall(b"later\n")
    world.turn()
    world.pass_time(6)
    assert waiting.recv(10) == b""
    # a request begins the patience anew
    silent.sendall(b"here\n")
    world.turn()
    world.pass_time(29)
    silent.setblocking(False)
    assert silent.recv(10) == b"here\n"
    with pytest.raises(BlockingIOError):
        silent.recv(10)
    world.pass_time(2)
    assert silent.recv(10) == b""


def test_who_does_not_read_its_answers_is_closed(world):
    client = world.client()
    client.setblocking(False)
    line = b"y" * (LINE_BYTES - 1) + b"\n"
    assert is_full(world, client, line * 50)
    world.turn(200_000 // LINE_BYTES)
    world.pass_time(PATIENCE.reader + 1)
    client.settimeout(5)
    with pytest.raises(ConnectionResetError):        # with requests unread, too
        read_to_the_end(client)
    assert not world.server._clients


def read_to_the_end(sock) -> None:
    while sock.recv(1 << 20):
        pass


def is_full(world, client, data) -> bool:
    try:
        while client.send(data):
            world.turn(3)
    except BlockingIOError:
        return True
    return False


def test_a_closed_half_gets_its_answers_and_the_end(world):
    client = world.client()
    client.sendall(b"a\nb\nunfinished")
    client.shutdown(socket.SHUT_WR)
    world.turn(3)
    assert client.recv(100) == b"a\nb\n"
    assert client.recv(100) == b""


def test_nothing_is_heard_after_the_last_answer(world):
    client = world.client()
    client.sendall(b"last\nmore\n")
    world.turn()
    assert (client.recv(100), client.recv(100)) == (b"last\n", b"")
    assert world.taken == 1


def test_a_defect_costs_its_own_connection_only(world):
    bad, good = world.client(), world.client()
    bad.sendall(b"defect\n")
    good.sendall(b"fine\n")
    world.turn()
    assert bad.recv(100) == b""
    assert good.recv(100) == b"fine\n"


def test_a_defect_that_waited_behind_a_late_answer_ends_its_connection_and_harms_nobody_who_answers(world):
    # given a request under way, and one behind it that will meet a defect
    client = world.client()
    client.sendall(b"later\ndefect\n")
    world.turn()
    echo, = world.server._clients
    # when the first is answered, by whoever has the answer
    echo.answer(b"at last\n")
    # then nothing comes back to him, and the client is not left to wait
    world.turn()
    assert echo.is_closed
    assert client.recv(100) == b""


def test_beyond_the_limit_the_longest_unused_makes_room(world):
    first, *others = (world.client() for _ in range(4))
    others[0].sendall(b"later\n")
    first.sendall(b"x\n")
    world.turn()
    assert first.recv(10) == b"x\n"
    # when one more comes: the busy one stays, and the one that was used last
    late = world.client()
    assert others[1].recv(10) == b""
    late.sendall(b"in\n")
    first.sendall(b"still\n")
    world.turn()
    assert (late.recv(10), first.recv(10)) == (b"in\n", b"still\n")


@pytest.fixture
def no_descriptors(monkeypatch):
    """While this context lasts, the process has no descriptor left for an accepted connection."""
    @contextlib.contextmanager
    def spent():
        def accept(sock):
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patched, captured_log() as logged:
            patched.setattr(socket.socket, "accept", accept)
            yield logged
    return spent


def test_out_of_descriptors_who_is_unused_makes_room_and_the_loop_rests_when_nobody_is(world, no_descriptors):
    unused, asking = world.client(), world.client()
    asking.sendall(b"later\n")
    world.turn()
    # given a client that comes when no descriptor is left
    with no_descriptors() as logged:
        late = world.client()
        # then who asked nothing makes room
        assert unused.recv(10) == b""
        # and when there is no room yet, nothing wakes the loop before the pause is over; the log says it once
        world.turn()
        assert world.selector.select(0) == []
        assert len(logged.find("accept() failed; fd=")) == 1
    late.sendall(b"hello\n")
    world.turn(3)
    late.setblocking(False)
    with pytest.raises(BlockingIOError):
        late.recv(10)
    world.pass_time(PAUSE_S)
    world.turn(2)
    assert late.recv(10) == b"hello\n"
    asking.setblocking(False)
    with pytest.raises(BlockingIOError):
        asking.recv(10)


def test_out_of_descriptors_some_are_left_to_the_rest_of_the_process(tmp_path, no_descriptors):
    world = World(tmp_path, connections=1000)
    with contextlib.closing(world):
        for _ in range(3 * SPARED):
            world.client()
        with no_descriptors():
            world.client()
        # so many make room at once, and do not come back
        for _ in range(SPARED):
            world.client()
        world.turn(SPARED)
        assert len(world.server._clients) == 2 * SPARED


def test_out_of_descriptors_is_said_once_a_second(world, no_descriptors):
    with no_descriptors() as logged:
        world.client()
        for _ in range(15):
            world.pass_time(PAUSE_S)
            world.turn()
        first, second = logged.find("accept() failed; fd=")
    assert first.text.endswith("error='Too many open files', suppressed='0'")
    assert second.text.endswith("suppressed='9'") or second.text.endswith("suppressed='10'")


def test_a_server_that_is_closed_during_a_pause_stays_closed(world, no_descriptors):
    with no_descriptors() as logged:
        world.client()
        world.server.close()
        world.pass_time(PAUSE_S)
        assert not logged.find("Traceback")
    assert not world.selector.get_map()


def test_the_kernel_says_who_the_peer_is(world):
    world.client()
    client, = world.server._clients
    assert (client.peer.pid, client.peer.uid) == (os.getpid(), os.getuid())
    assert os.getgid() in client.peer.gids
