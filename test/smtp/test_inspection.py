"""Messages that go through a stacked program or proxy."""

from __future__ import annotations

import socket
import threading

import pytest

from test.smtp.play import CLOSING, OpenSmtp, open_smtp
from test.support.children import new_mark, wait_until_gone
from Zorp.AnyPy import ANYPY_ACCEPT, ANYPY_DROP, ANYPY_ERROR, ANYPY_REJECT, AnyPyProxy
from Zorp.Constants import Z_STACK_PROGRAM, Z_STACK_PROXY
from Zorp.Plug import PlugProxy
from Zorp.Smtp import SMTP_STK_MIME, SMTP_STK_NONE
from Zorp.Stream import StreamException

BODY = b"Subject: t\r\n\r\nhello\r\n..dots\r\n...\r\n.\r\n"
MESSAGE = b"Subject: t\r\n\r\nhello\r\n.dots\r\n..\r\n"
FAILED = "421 Service not available, closing transmission channel"


def inspected(form, key="*", **settings):
    """Return a policy whose messages go through this."""
    return open_smtp(request_stack={key: (SMTP_STK_MIME, form)}, **settings)


def program(command, **settings):
    return inspected((Z_STACK_PROGRAM, command), **settings)


def begin(play):
    """From the banner to the 354 in the server's name."""
    play.greet()
    play.envelope()
    ask_for_message(play)


def ask_for_message(play):
    play("""
        C> DATA
        S< NOOP
        S> 250 awake
        C< 354 Go on, send your message
    """)


def server_takes_data(play, body=BODY):
    play("""
        S< DATA
        S> 354 go ahead
    """)
    assert play.server.bytes(len(body)) == body


def server_forgets(play, reply):
    """The server hears RSET and no DATA, the client this reply, and the next command works."""
    play(f"""
        S< RSET
        S> 250 forgotten
        C< {reply}
    """)
    play.goes_on()


def accounting(play):
    """Return the first accounting line; it is written after the client has its answer."""
    return play.log.wait_for("Accounting;").text


def verdict_of(value, description, output=b"", read=True):
    """Return an AnyPy class that reads the message, gives this verdict, and then writes."""

    class Judge(AnyPyProxy):
        def proxyThread(self):
            try:
                while read:
                    self.client_stream.read(65536)
            except StreamException:
                pass
            self.set_verdict(value, description)
            if output:
                self.server_stream.write(output)

    return Judge


# what passes

@pytest.mark.parametrize("form", [
    (Z_STACK_PROGRAM, "/bin/cat"), "cat", PlugProxy, (Z_STACK_PROXY, PlugProxy)],
    ids=["tuple", "text", "class", "proxy"])
def test_a_child_that_copies_leaves_the_message_as_it_is(mail, form):
    """Scenario 25: the server sees NOOP, then DATA, then the same bytes."""
    with mail(inspected(form)) as play:
        begin(play)
        play.client.send(BODY)
        server_takes_data(play)
        play.stored()
        assert "result='success'" in accounting(play)
        # and the next message goes the same way
        play.envelope()
        ask_for_message(play)
        play.client.send(BODY)
        server_takes_data(play)
        play.stored()
        play.quit()


@pytest.mark.parametrize("cut", [1, 7])
def test_cutting_of_the_body_changes_nothing(mail, cut):
    with mail(program("cat")) as play:
        begin(play)
        for start in range(0, len(BODY), cut):
            play.client.send(BODY[start:start + cut])
        server_takes_data(play)
        play.stored()


def test_child_sees_the_message_without_dot_stuffing(mail, tmp_path):
    with mail(program(f"tee {tmp_path / 'seen'}")) as play:
        begin(play)
        play.client.send(BODY)
        server_takes_data(play)
        play.stored()
        assert (tmp_path / "seen").read_bytes() == MESSAGE


def test_line_feeds_of_a_child_become_line_ends(mail):
    with mail(program(r"cat >/dev/null; printf 'a\n.\nb\r\n\n.c'")) as play:
        begin(play)
        play.client.send(BODY)
        server_takes_data(play, b"a\r\n..\r\nb\r\n\r\n..c\r\n.\r\n")
        play.stored()


def test_received_line_goes_through_the_child(mail):
    class Received(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.add_received_header = True
            self.request_stack["DATA"] = (SMTP_STK_MIME, "tr a-z A-Z")

        def generateReceived(self):
            return "Received: from us\r\n"

    with mail(Received) as play:
        begin(play)
        play.client.send(b"x\r\n.\r\n")
        server_takes_data(play, b"RECEIVED: FROM US\r\nX\r\n.\r\n")
        play.stored()


def test_large_message_through_a_child(mail):
    body = b"".join(b"line %d %s\r\n" % (number, b"x" * 70) for number in range(20_000)) + b".\r\n"
    with mail(program("cat")) as play:
        begin(play)
        play.client._sock.settimeout(30)
        sender = threading.Thread(target=play.client.send, args=(body,))
        sender.start()
        server_takes_data(play, body)
        sender.join()
        play.stored()


def test_empty_message_through_a_child_is_refused(mail):
    with mail(program("cat")) as play:
        begin(play)
        play.client.send(b".\r\n")
        server_forgets(play, CLOSING)
        assert play.log.find("Rejecting empty message;")


def test_commands_behind_the_message_are_kept(mail):
    with mail(program("cat")) as play:
        begin(play)
        play.client.send(BODY + b"NOOP\r\n")
        server_takes_data(play)
        play("""
            S> 250 stored
            C< 250 stored
            S< NOOP
            S> 250 here
            C< 250 here
        """)


def test_no_stacking_where_the_table_says_none(mail):
    with mail(open_smtp(request_stack={"DATA": (SMTP_STK_NONE, "cat"), "*": (SMTP_STK_MIME, "false")})) as play:
        play.greet()
        play.send_mail()


# verdicts

@pytest.mark.parametrize(("judge", "reply", "log"), [
    (verdict_of(ANYPY_REJECT, "Virus X"), "550 Error storing message (Virus X)",
     "Invalid contents; stack_info='Virus X'"),
    (verdict_of(ANYPY_DROP, "spam"), "250 Message discarded (spam)",
     "Message dropped, invalid contents; stack_info='spam'"),
    (verdict_of(ANYPY_ERROR, "broken"), CLOSING, "Error occurred while scanning contents; stack_info='broken'"),
    (verdict_of(ANYPY_ACCEPT, "fine"), CLOSING, "Rejecting empty message;"),
    (verdict_of(0, "?"), CLOSING, "Rejecting empty message;"),
    (verdict_of(ANYPY_REJECT, "a\r\n250 ok"), "550 Error storing message (a)", "Invalid contents"),
    (verdict_of(ANYPY_REJECT, ""), "550 Error storing message", "Invalid contents"),
    (verdict_of(ANYPY_REJECT, "early", read=False), "550 Error storing message (early)", "Invalid contents"),
    (verdict_of(ANYPY_REJECT, "bad", output=b"content\r\n"), "550 Error storing message (bad)", "Invalid contents"),
])
def test_verdict_without_output(mail, judge, reply, log):
    """Scenarios 26 and 27: RSET and no DATA to the server, and the next transaction works."""
    with mail(inspected(judge)) as play:
        begin(play)
        play.client.send(BODY)
        server_forgets(play, reply)
        assert play.log.find(log)
        assert "result='failure'" in accounting(play)
        assert f"response='{reply[:3]}'" in accounting(play)


def test_verdict_of_a_program(mail):
    """addressing-helpers 30: the verdict counts although the program is gone before anybody reads it."""
    command = r"printf '0 SETVERDICT\n[]Verdict\nZ_REJECT\n[]Description\nEicar was found in the content.\n\n' >&3"
    with mail(program(command)) as play:
        play.greet()
        for _ in range(200):
            play.envelope()
            ask_for_message(play)
            play.client.send(BODY)
            play("""
                S< RSET
                S> 250 forgotten
                C< 550 Error storing message (Eicar was found in the content.)
            """)
    found = play.log.find("Received verdict from stacked proxy; verdict='Reject data', description='Eicar")
    assert len(found) == 200
    assert (found[0].tag, found[0].level) == ("core.info", 4)


def test_verdict_that_comes_with_the_first_output_counts(mail):
    command = r"cat >/dev/null; printf '0 SETVERDICT\n[]Verdict\nZ_DROP\n\n' >&3; echo content"
    with mail(program(command)) as play:
        begin(play)
        play.client.send(BODY)
        server_forgets(play, "250 Message discarded")


@pytest.mark.parametrize(("value", "reply"), [
    (ANYPY_REJECT, "550 Error storing message (late)"), (ANYPY_ERROR, "451 Error storing message (late)"),
    (ANYPY_DROP, "250 Message discarded (late)")])
def test_verdict_after_output_keeps_the_message_from_being_stored(mail, value, reply):
    class Late(AnyPyProxy):
        def proxyThread(self):
            self.server_stream.write("Subject: x\r\n")
            try:
                while True:
                    self.client_stream.read(65536)
            except StreamException:
                self.set_verdict(value, "late")

    with mail(inspected(Late)) as play:
        begin(play)
        play("""
            S< DATA
            S> 354 go ahead
        """)
        assert play.server.bytes(10) == b"Subject: x"
        play.client.send(BODY)
        # no end of data: the server's connection ends inside the message
        assert play.server.rest() == b""
        play(f"""
            C< {reply}
            C> NOOP
            C< 503 Server not available
        """)
        assert play.log.find("Verdict of stacked proxy came after content was passed on;")


# children that break

class Crashing(AnyPyProxy):
    def proxyThread(self):
        self.client_stream.read(5)
        raise ValueError("broken")


BROKEN = {
    "exit status": "cat >/dev/null; exit 3",
    "missing": "/nonexistent/scanner",
    "killed": "kill -9 $$",
    "does not read": "exec 0<&-; exit 1",
    "stays without output": "exec 0<&- 1<&-; sleep 100",
    "rubbish on the control channel": "cat >/dev/null; echo rubbish >&3",
    "crash": Crashing,
}


@pytest.mark.parametrize("form", BROKEN.values(), ids=BROKEN)
def test_child_that_breaks_before_output(mail, form):
    with mail(inspected(form)) as play:
        begin(play)
        play.client.send(BODY)
        server_forgets(play, CLOSING)
        assert play.log.find("Error occurred while scanning contents;")


@pytest.mark.parametrize("command", ["head -c 5; exit 1", "cat; kill -9 $$"])
def test_child_that_breaks_after_output(mail, command):
    with mail(program(command)) as play:
        begin(play)
        play.client.send(BODY)
        play("""
            S< DATA
            S> 354 go ahead
        """)
        play.server.rest()
        assert play.reply()[0].startswith("451 Error storing message (")


def test_exit_status_may_be_ignored(mail, monkeypatch):
    monkeypatch.setattr("Zorp.Config.config.options.stack_program_ignore_exit", 1)
    with mail(program("cat; exit 1")) as play:
        begin(play)
        play.client.send(BODY)
        server_takes_data(play)
        play.stored()


def test_child_that_sends_a_lone_cr(mail):
    with mail(program(r"cat >/dev/null; printf 'a\rb\r\n'")) as play:
        begin(play)
        play.client.send(BODY)
        play("""
            S< DATA
            S> 354 go ahead
            S|
        """)
        assert play.reply()[0].startswith("451 Error storing message (")


def test_child_that_hangs_is_killed_after_the_timeout(mail):
    """addressing-helpers 32: the transfer fails after the proxy's timeout, and no process is left."""
    mark = new_mark()
    with mail(program(f": {mark}; trap '' TERM; sleep 1000; :", timeout=300)) as play:
        begin(play)
        play.client.send(BODY)
        server_forgets(play, CLOSING)
        assert play.log.find("Data transfer timed out; timeout='300'")
        wait_until_gone(mark)


def test_child_proxy_that_hangs_fails_the_transfer(mail):
    class Hanging(AnyPyProxy):
        def proxyThread(self):
            Hanging.may_end.recv(1)

    ours, Hanging.may_end = socket.socketpair()
    with Hanging.may_end, ours, mail(inspected(Hanging, timeout=300)) as play:
        begin(play)
        play.client.send(BODY)
        server_forgets(play, CLOSING)
        assert play.log.find("Data transfer timed out; timeout='300'")
        ours.close()                                     # the thread of a proxy is not to be killed


@pytest.mark.parametrize("form", [(Z_STACK_PROXY,), (3, None, "x"), 5])
def test_stacking_that_cannot_start_leaves_no_server(mail, form):
    with mail(inspected(form)) as play:
        play.greet()
        play.envelope()
        play(f"""
            C> DATA
            C< {CLOSING}
            S|
            C> NOOP
            C< 503 Server not available
            C> QUIT
            C< 221 Bye
        """)
        assert play.log.find("Could not start stacked proxy, rejecting transfer;")


# the client

def test_body_with_a_lone_lf_is_never_completed(mail):
    with mail(program("cat")) as play:
        begin(play)
        play.client.send(b"a\nb\r\n.\r\n")
        play("C< 550 Mail body error (probably incorrect CRLF sequence)")
        assert b"DATA" not in play.server.rest()


def test_client_that_leaves_in_the_body_leaves_no_mail_and_no_process(mail):
    mark = new_mark()
    with mail(program(f": {mark}; cat")) as play:
        begin(play)
        play.client.send(b"begun\r\n")
        play("""
            S< DATA
            S> 354 go ahead
        """)
        assert play.server.bytes(5) == b"begun"
        play.session.client.close()
        assert play.server.rest() == b""
        wait_until_gone(mark)


def test_silent_client_times_out(mail):
    with mail(program("cat", timeout=300)) as play:
        begin(play)
        play.client.send(b"begun\r\n")
        play(f"C< {FAILED}")


def test_message_that_is_too_large(mail):
    with mail(program("cat >/dev/null", max_message_size=20)) as play:
        begin(play)
        play.client.send(b"x" * 30 + b"\r\n.\r\n")
        server_forgets(play, "552 Message size exceeds fixed limit")


# the server

def test_silent_child_and_server_that_is_kept_awake(mail):
    """Scenario 28."""
    class Slow(AnyPyProxy):
        def proxyThread(self):
            text = ""
            try:
                while True:
                    text += self.client_stream.read(65536)
            except StreamException:
                Slow.may_go_on.recv(1)
                self.server_stream.write(text)

    ours, Slow.may_go_on = socket.socketpair()
    with ours, Slow.may_go_on, mail(inspected(Slow, interval_transfer_noop=100)) as play:
        begin(play)
        play.client.send(BODY)
        for _ in range(2):
            play("""
                S< NOOP
                S> 250 awake
            """)
        ours.send(b"x")
        line = play.server.line()
        while line == b"NOOP\r\n":
            play("S> 250 awake")
            line = play.server.line()
        assert line == b"DATA\r\n"
        play("S> 354 go ahead")
        assert play.server.bytes(len(BODY)) == BODY
        play.stored()


def test_server_that_does_not_wake_up(mail):
    with mail(program("cat")) as play:
        play.greet()
        play.envelope()
        play("""
            C> DATA
            S< NOOP
            S> 500 what
            C< 450 Mailbox unavailable, try again
        """)
        play.goes_on()


def test_server_that_dies_while_the_child_is_silent(mail):
    with mail(program("cat >/dev/null; sleep 100", interval_transfer_noop=100)) as play:
        begin(play)
        play.client.send(BODY)
        play("S< NOOP")
        play.session.server.close()
        play(f"C< {FAILED}")
        assert play.log.find("Data transfer interrupted by progress;")


def test_server_that_refuses_data(mail):
    with mail(program("cat")) as play:
        begin(play)
        play.client.send(BODY)
        play("""
            S< DATA
            S> 554 no
        """)
        server_forgets(play, FAILED)


def test_server_that_refuses_the_message(mail):
    with mail(program("cat")) as play:
        begin(play)
        play.client.send(BODY)
        server_takes_data(play)
        play("""
            S> 552 too big
            C< 552 too big
        """)
        play.goes_on()


def test_policy_that_refuses_replies_we_need_is_ignored(mail):
    class Strict(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request_stack["*"] = (SMTP_STK_MIME, "cat")
            self.response["NOOP", "250"] = (3, "500", "no")
            self.response["DATA", "354"] = (3, "500", "no")

    with mail(Strict) as play:
        begin(play)
        play.client.send(BODY)
        server_takes_data(play)
        play.stored()
        assert play.log.find("Invalid policy ignored, allowing 250 response to NOOP is required;")
        assert play.log.find("Invalid policy ignored, allowing 354 response to DATA is required;")


# BDAT

def test_chunking_is_not_offered_with_stacking(mail):
    with mail(open_smtp(permit=("CHUNKING",), request_stack={"*": (SMTP_STK_MIME, "cat")})) as play:
        assert play.greet("CHUNKING", "8BITMIME") == ["250-mx.example", "250 8BITMIME"]


def test_stacking_that_is_decided_late_lets_no_chunk_through(mail):
    class Late(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.extensions["CHUNKING"] = 1

    Late._may_stack = lambda self: False
    Late.requestStack = lambda self: "cat"
    with mail(Late) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 5 LAST\r\nhello")
        play("C< 503 Invalid command in this state")
        play.goes_on()
