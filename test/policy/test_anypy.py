"""AnyPy: a policy that speaks the protocol itself."""

from __future__ import annotations

import pytest

from test.support.proxies import serve
from Zorp.AnyPy import ANYPY_ACCEPT, ANYPY_REJECT, AbstractAnyPyProxy, AnyPyProxy
from Zorp.engine.builtin_proxy import running
from Zorp.Constants import Z_STACK_PROXY
from Zorp.Stream import G_IO_STATUS_EOF, G_IO_STATUS_ERROR, StreamException

__all__ = ["serve"]


class Shout(AnyPyProxy):
    """Every line of the client goes to the server in capitals."""

    def proxyThread(self):
        while True:
            self.session.server_stream.write(self.session.client_stream.readline().upper() + "\r\n")


def ending_with(todo, **settings):
    """Return a proxy class that keeps what todo(proxy) gave or raised in `.outcome`."""

    class Ending(AnyPyProxy):
        outcome = None

        def config(self):
            for name, value in settings.items():
                setattr(self, name, value)

        def proxyThread(self):
            try:
                type(self).outcome = todo(self)
            except Exception as problem:
                type(self).outcome = problem

    return Ending


def test_line_is_changed_on_its_way(serve):
    with serve(Shout) as session:
        session.client.sendall(b"hello\r\n")
        assert session.server.recv(100) == b"HELLO\r\n"
        session.client.sendall(b"with a bare LF\nand more\n")
        assert session.server.makefile("rb").read(26) == b"WITH A BARE LF\r\nAND MORE\r\n"


def test_readline_at_end_of_file(serve):
    proxy_class = ending_with(lambda proxy: proxy.client_stream.readline())
    with serve(proxy_class) as session:
        session.client.close()
        session.wait_for_end()
    assert isinstance(proxy_class.outcome, StreamException)
    assert proxy_class.outcome.args[0] == G_IO_STATUS_EOF


def test_uncaught_end_of_file_ends_the_session_and_is_logged(serve):
    with serve(Shout) as session:
        session.client.close()
        assert session.server.recv(1) == b""
        session.wait_for_end()
    assert any("StreamException" in text for text in session.log.texts("core.error"))


@pytest.mark.parametrize(("limit", "line"), [(4096, b"x" * 5000 + b"\r\n"), (20, b"x" * 30 + b"\r\n")])
def test_line_beyond_the_limit(serve, limit, line):
    proxy_class = ending_with(lambda proxy: proxy.client_stream.readline(), client_max_line_length=limit)
    with serve(proxy_class) as session:
        session.client.sendall(line)
        session.wait_for_end()
    assert isinstance(proxy_class.outcome, StreamException)
    assert proxy_class.outcome.args[0] == G_IO_STATUS_ERROR
    assert session.log.find("Error while fetching line; error='Line too long")


@pytest.mark.parametrize(("line", "outcome"), [(b"12345678\r\n", "12345678"), (b"123456789\n", "123456789"),
                                                (b"123456789\r\n", None), (b"1234567890\n", None)])
def test_line_limit_counts_the_line_end(serve, line, outcome):
    proxy_class = ending_with(lambda proxy: proxy.client_stream.readline(), client_max_line_length=10)
    with serve(proxy_class) as session:
        session.client.sendall(line)
        session.wait_for_end()
    if outcome is None:
        assert proxy_class.outcome.args == (G_IO_STATUS_ERROR, None)
    else:
        assert proxy_class.outcome == outcome


def test_nul_in_a_line_is_an_error_unless_permitted(serve):
    def read_two(proxy):
        proxy.client_stream.nul_nonfatal = 1
        first = proxy.client_stream.readline()
        proxy.client_stream.nul_nonfatal = 0
        try:
            proxy.client_stream.readline()
        except StreamException as problem:
            return first, problem.args

    proxy_class = ending_with(read_two)
    with serve(proxy_class) as session:
        session.client.sendall(b"a\0b\r\nc\0d\r\n")
        session.wait_for_end()
    assert proxy_class.outcome == ("a\0b", (G_IO_STATUS_ERROR, None))
    assert session.log.find("Error while fetching line; error='Invalid line, embedded NUL character found, buffer=[")


def test_raw_stream_gives_bytes(serve):
    def read_raw(proxy):
        stream = proxy.client_stream
        text = stream.readline()
        stream.raw = 1
        stream.write(b"\xff")
        return text, stream.readline(), stream.read(10)

    proxy_class = ending_with(read_raw)
    with serve(proxy_class) as session:
        session.client.sendall(b"\xe9\n\xe9\nrest")
        assert session.client.recv(1) == b"\xff"
        session.wait_for_end()
    assert proxy_class.outcome == ("\xe9", b"\xe9", b"rest")


def test_split_gives_a_long_line_in_pieces(serve):
    def read_pieces(proxy):
        stream = proxy.client_stream
        stream.split = 1
        pieces = []
        while True:
            try:
                return [*pieces, stream.readline()]
            except StreamException as problem:
                pieces.append(problem.args)

    proxy_class = ending_with(read_pieces, client_max_line_length=4)
    with serve(proxy_class) as session:
        session.client.sendall(b"12345678ab\n")
        session.wait_for_end()
    assert proxy_class.outcome == [(3, "1234"), (3, "5678"), "ab"]


def test_both_names_of_a_stream_are_the_same_object(serve):
    proxy_class = ending_with(lambda proxy: (proxy.client_stream is proxy.session.client_stream,
                                             proxy.server_stream is proxy.session.server_stream))
    with serve(proxy_class) as session:
        session.wait_for_end()
    assert proxy_class.outcome == (True, True)


def test_server_is_connected_first_and_once(serve):
    # given a policy of old days, which connects by itself
    proxy_class = ending_with(lambda proxy: (proxy.connectServer("", 0) is proxy.server_stream,
                                             proxy.connectServer() is proxy.server_stream))
    with serve(proxy_class) as session:
        session.wait_for_end()
    assert proxy_class.outcome == (True, True)
    assert session.chainer.asked == 1


def test_without_a_server_proxy_thread_does_not_run(serve):
    proxy_class = ending_with(lambda proxy: "ran")
    with serve(proxy_class, server_listens=False) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == "DENIED_BY_CONNECTION_FAIL"
    assert proxy_class.outcome is None


@pytest.mark.parametrize("proxy_class", [AnyPyProxy, AbstractAnyPyProxy])
def test_proxy_thread_must_be_written(serve, proxy_class):
    with serve(proxy_class) as session:
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert any("NotImplementedError" in text for text in session.log.texts("core.error"))


def test_proxy_thread_that_raises_ends_the_session(serve):
    class Raising(AnyPyProxy):
        def proxyThread(self):
            self.client_stream.write("bye")
            raise ValueError("own")

    with serve(Raising) as session:
        assert session.client.recv(10) == b"bye"
        assert session.client.recv(1) == b""
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert "Traceback: ValueError: own" in session.log.texts("core.error")


def test_stop_request_interrupts_a_reading_policy(serve):
    with serve(Shout) as session:
        session.client.sendall(b"a\n")
        assert session.server.recv(10) == b"A\r\n"
        assert running.stop_session(session.master.session_id) == 1
        assert session.client.recv(1) == b""
        assert session.verdict == "ACCEPTED"
    assert not session.log.texts("core.error")


# towards a parent

@pytest.mark.parametrize(("name", "arguments"), [
    ("set_verdict", ()), ("set_verdict", ("3", "bad")), ("set_verdict", (ANYPY_REJECT, 5)),
    ("set_verdict", (ANYPY_REJECT, "bad", 1)), ("set_content_hint", ("12",)), ("set_content_hint", ()),
])
def test_bad_arguments_are_refused(serve, name, arguments):
    proxy_class = ending_with(lambda proxy: getattr(proxy, name)(*arguments))
    with serve(proxy_class) as session:
        session.wait_for_end()
    assert isinstance(proxy_class.outcome, ValueError)
    assert str(proxy_class.outcome) == "Invalid arguments."


def test_verdict_without_a_parent_is_ignored(serve):
    proxy_class = ending_with(lambda proxy: (proxy.set_verdict(ANYPY_ACCEPT, "fine"), proxy.set_content_hint(12)))
    with serve(proxy_class) as session:
        assert session.verdict == "ACCEPTED"
    assert proxy_class.outcome == (None, None)


def test_stacking_that_fails_raises(serve):
    proxy_class = ending_with(lambda proxy: proxy.stack(Z_STACK_PROXY))
    with serve(proxy_class) as session:
        session.wait_for_end()
    assert isinstance(proxy_class.outcome, RuntimeError)
    assert str(proxy_class.outcome) == "Stacking failed."
    assert session.log.find("Invalid stack tuple;")[0].tag == "core.policy"
