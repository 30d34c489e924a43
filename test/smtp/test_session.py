"""The session as a whole: without a server, its log, its end, and mail programs that people use."""

from __future__ import annotations

import contextlib
import select
import smtplib
import socket
import threading

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP

from test.smtp.play import CLOSING, open_smtp
from test.smtp.test_tables import with_tables
from test.support.daemon import wait_until
from Zorp.Smtp import SMTP_REQ_ABORT, SMTP_REQ_POLICY, SMTP_REQ_REJECT

# how the bytes come


def test_more_in_one_segment_than_is_received_at_once(mail):
    # given a reply and a batch of commands that are each longer than what a first read takes
    names = [f"noop-{number:02}-{'x' * 30}" for number in range(30)]
    with mail(open_smtp(max_response_length=1024)) as play:
        play(f"""
            S> 220-mx.example {"a" * 400}
            S> 220 mx.example {"b" * 700}
            C< 220-mx.example {"a" * 400}
            C< 220 mx.example {"b" * 700}
            C> EHLO a
            S< EHLO a
            S> 250 mx.example
            C< 250 mx.example
        """)
        # when the client sends all its commands at once
        play.client.send("".join(f"NOOP {name}\r\n" for name in names).encode())
        # then they arrive one by one, whole and in order
        for name in names:
            play(f"""
                S< NOOP {name}
                S> 250 {name}
                C< 250 {name}
            """)
        play.quit()


# no server


def test_commands_are_checked_without_asking_the_policy(mail):
    asked = []

    def callback(self, cmd, param):
        asked.append(cmd)
        return 1

    policy = with_tables(
        {"NOOP": (SMTP_REQ_POLICY, "=callback"), "XREJECT": (SMTP_REQ_REJECT, "550", "no")}, callback=callback
    )
    with mail(policy, connected=False) as play:
        play("""
            C< 451 Server not available
            C> NOOP
            C< 503 Server not available
            C> XREJECT
            C< 550 no
            C> FOO
            C< 500 Invalid command
            C> EHLO a b
            C< 500 Invalid command
            C> DATA
            C< 503 Invalid command in this state
            C> STARTTLS
            C< 503 Invalid command in this state
        """)
        play.client.send(b"BDAT 5\r\nNOOP\nQUIT\r\n")
        play("""
            C< 503 Invalid command in this state
            C< 221 Bye
            C|
        """)
    assert asked == []


def test_client_without_server_may_try_twenty_commands(mail):
    with mail(open_smtp(max_errors=0), connected=False) as play:
        play.client.send(b"NOOP\r\n" * 30)
        replies = play.client.rest().splitlines()
    assert replies == [b"451 Server not available", *[b"503 Server not available"] * 20, CLOSING.encode()]


def test_abort_without_server(mail):
    with mail(with_tables({"NOOP": SMTP_REQ_ABORT}), connected=False) as play:
        play(f"""
            C< 451 Server not available
            C> NOOP
            C< {CLOSING}
            C|
        """)


def test_chunk_of_unknown_size_without_server(mail):
    with mail(connected=False) as play:
        play("""
            C< 451 Server not available
            C> BDAT x
            C< 501 Invalid BDAT command, closing transmission channel
            C|
        """)


# the log


REPLY = ("Fetching response;", "Response parsed; response='%d', param='%s'", "Processing response;")
REQUEST = ("Fetching request;", "Request parsed; request='%s', param='%s'", "Processing request;")
FORWARD = "Copying request to server; request='%s', param='%s'"
COPY = "Copying response to client;"
ONE_MAIL = [
    *REPLY, COPY,
    *REQUEST, FORWARD, *REPLY, COPY,
    *REQUEST, "Sender check successful; email='%s'", FORWARD, *REPLY,
    "Server accepted the sender; sender='%s', response='%s', response_param='%s'", COPY,
    *REQUEST, "Relay check, checking client_zone; client_zone='%s'", "Relay check successful; email='%s'",
    "Recipient check successful; email='%s'", FORWARD, *REPLY,
    "Server accepted the recipient; recipient='%s', response='%s', response_param='%s'", COPY,
    *REQUEST, FORWARD, *REPLY, COPY,
    *REPLY, COPY, "Accounting; sender='%s', recipient='%s', response='%s', response_param='%s', result='%s'",
    "End of message; client_address='%s', recipients='%d', size='%d'",          # ours
    *REQUEST, FORWARD, *REPLY, COPY,
    "Exiting SMTP loop;",
]


def test_log_of_one_mail_at_the_highest_verbosity(mail):
    # given one mail, sent through
    with mail() as play:
        play.greet()
        play.send_mail()
        play.quit()
    # then the log tells each step, in the words and the order of the original
    smtp = [message for message in play.log.messages if message.tag.startswith("smtp.")]
    assert [message.template for message in smtp] == ONE_MAIL
    levels = {message.template: (message.tag, message.level) for message in smtp}
    assert levels[FORWARD] == ("smtp.debug", 6)
    assert levels[REQUEST[1]] == ("smtp.request", 7)
    assert levels[REPLY[1]] == ("smtp.response", 7)
    assert play.log.has(REQUEST[1], ("MAIL", "FROM:<a@x.example>"))
    assert play.log.has(FORWARD, ("MAIL", "From:<a@x.example>"))
    assert all(message.session.endswith("/smtp") for message in smtp)


def test_log_of_an_unknown_command_and_a_line_without_cr(mail):
    with mail() as play:
        play.greet()
        play("""
            C> FOO
            C< 500 Invalid command
        """)
        play.client.send(b"HELO a\n")
        play(f"""
            C< {CLOSING}
            C|
        """)
    found = [
        (message.tag, message.level, message.text)
        for message in play.log.messages
        if message.tag in ("smtp.policy", "smtp.violation", "core.error")
    ]
    assert found == [
        ("smtp.policy", 2, "Request not allowed by policy; request='FOO', verdict='3'"),
        ("smtp.violation", 2, "Unknown command; request='FOO'"),
        ("core.error", 3, "Error while fetching line; error='Invalid line, bad CRLF sequence, buffer=[HELO a]'"),
    ]
    assert play.log.find("Error while fetching line")[0].session.endswith("client")


# the end


@pytest.mark.parametrize("moment", ["command", "reply", "body"])
def test_stop_request_ends_the_session_at_once(mail, moment):
    with mail() as play:
        play.greet()
        if moment == "reply":
            play("""
                C> NOOP
                S< NOOP
            """)
        elif moment == "body":
            play.envelope()
            play.data()
        play.proxy.request_stop()
        # then the client hears that the service ends, and nothing more
        play(f"""
            C< {CLOSING.rstrip(".") if moment == "body" else CLOSING}
            C|
        """)
        play.session.wait_for_end()
        assert play.log.find("User initiated proxy termination request received;")


def test_a_stop_request_before_there_is_a_server_is_the_greeting(serve):
    # given a client whose server is still being reached
    with serve(open_smtp(), start=False) as session:
        reaching, given_up = threading.Event(), threading.Event()
        session.chainer.chainParent = lambda _session: reaching.set() or (given_up.wait(10) and None)
        session.start()
        assert reaching.wait(10)
        # when the session is stopped
        session.proxy.request_stop()
        given_up.set()
        # then 421 is all that it hears
        assert session.client.makefile("rb").read() == f"{CLOSING}\r\n".encode()


def test_a_stop_request_does_not_wait_for_a_client_that_reads_nothing(mail):
    # given a client that sends commands and takes no replies, until there is no room for another
    with mail(open_smtp(max_errors=0)) as play:
        play.greet()
        play.session.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        play.proxy._client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        threading.Thread(target=send_for_ever, args=(play.session.client, b"FOO\r\n" * 1000), daemon=True).start()
        wait_until(lambda: not select.select([], [play.proxy._client], [], 0)[1], "the full connection")
        # when the session is stopped, then it ends all the same
        play.proxy.request_stop()
        play.session.wait_for_end()


def send_for_ever(sock, data) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(data)


@pytest.mark.parametrize("leaver", ["client", "server"])
def test_either_side_may_leave(mail, leaver):
    with mail() as play:
        play.greet()
        if leaver == "client":
            play.session.client.close()
            play("S|")
        else:
            play.session.server.close()
            play.wait_until_the_server_is_heard()
            play(f"""
                C> NOOP
                C< {CLOSING}
                C|
            """)
        play.session.wait_for_end()
    assert play.session.verdict == "ACCEPTED"


# real programs


class Inbox:
    """Keeps what an aiosmtpd server receives."""

    def __init__(self):
        self.mails = []

    async def handle_DATA(self, server, session, envelope):
        self.mails.append((envelope.mail_from, envelope.rcpt_tos, envelope.content))
        return "250 stored"


class _Server(Controller):
    def factory(self):
        return SMTP(self.handler, enable_SMTPUTF8=True, decode_data=False)


@pytest.fixture
def real_server():
    inbox = Inbox()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    controller = _Server(inbox, hostname="127.0.0.1", port=port)
    controller.start()
    yield inbox, port
    controller.stop()


BODY = b"Subject: t\r\nFrom: a@b\r\n\r\n.dot\r\n..\r\n.\x20\r\n\xe9\xff\r\n" + b"x" * 900 + b"\r\n\r\n\r\n"


def test_02_smtplib_delivers_to_a_real_server(serve, real_server):
    inbox, port = real_server
    with serve(open_smtp(permit=("SMTPUTF8",)), start=False) as session:
        # given a session that is led to the real server
        session.chainer.address = ("127.0.0.1", port)
        session.start()
        client = smtplib.SMTP(timeout=10)
        client.sock = session.client
        client.file = None
        assert client.getreply()[0] == 220
        # when smtplib sends two mails and leaves
        client.ehlo("client.example")
        assert client.has_extn("8bitmime")
        assert (
            client.sendmail("a@x.example", ["b@y.example", "c@y.example"], BODY, mail_options=["BODY=8BITMIME"]) == {}
        )
        assert client.sendmail("a@x.example", "d@y.example", b"second\r\n") == {}
        client.quit()
        session.wait_for_end()
        # then both are stored as they were sent, and accounted
        assert inbox.mails == [
            ("a@x.example", ["b@y.example", "c@y.example"], BODY),
            ("a@x.example", ["d@y.example"], b"second\r\n"),
        ]
        assert [message.arguments[-1] for message in session.log.find("Accounting; ")] == ["success", "success"]
