"""Attack inputs: what must not reach the server, what the client gets instead, and that we do not grow or hang."""

from __future__ import annotations

import contextlib
import threading

import pytest

from test.smtp.play import CLOSING, OpenSmtp, open_smtp
from test.wire.test_smtp_body import ATTACKS, EVIL, HEAD, R, attack
from Zorp.Smtp import SMTP_EXT_ACCEPT, SMTP_REQ_ACCEPT, SMTP_REQ_POLICY, SMTP_REQ_REJECT

BODY_REFUSED = "550 Mail body error (probably incorrect CRLF sequence)"


def send(peer, data, bytewise):
    """Send in one segment or byte by byte; a peer that has left by then is no problem of ours."""
    with contextlib.suppress(OSError):
        for piece in [data[i : i + 1] for i in range(len(data))] if bytewise else [data]:
            peer.send(piece)


def open_body(play):
    play.greet()
    play.envelope()
    play.data()


# B: the end of data


@pytest.mark.parametrize("bytewise", [False, True], ids=["one segment", "byte by byte"])
@pytest.mark.parametrize("require_crlf", [1, 0], ids=["crlf", "lf"])
@pytest.mark.parametrize(("sequence", "strict", "lenient"), ATTACKS.values(), ids=ATTACKS)
def test_b_end_of_data_cannot_be_smuggled(mail, sequence, strict, lenient, require_crlf, bytewise):
    wanted = strict if require_crlf else lenient
    with mail(open_smtp(require_crlf=require_crlf)) as play:
        open_body(play)
        send(play.client, attack(sequence), bytewise)
        if wanted is R:
            play(f"C< {BODY_REFUSED}")
            assert play.client.rest() == b""
            got = play.server.rest()
            assert b"\r\n.\r\n" not in got
            assert b"victim@y" not in got
        else:
            passed = HEAD + wanted + EVIL
            assert play.server.bytes(len(passed)) == passed
            play.stored()
            play.goes_on()


def test_b11_first_line_of_two_dots_is_no_end(mail):
    with mail() as play:
        open_body(play)
        play.body(b"..\r\nMAIL FROM:<evil@x>\r\n.\r\n")
        play.stored()
        play.goes_on()


def test_b12_empty_body_gets_one_reply_at_once(mail):
    with mail() as play:
        open_body(play)
        play.body(b".\r\n")
        play.stored()
        play.goes_on()


@pytest.mark.parametrize("length", [*range(4093, 4100), *range(8190, 8195)])
def test_b13_long_lines_are_content(mail, length):
    with mail() as play:
        open_body(play)
        play.body(b"A" * length + b".\r\n.\r\n")
        play.stored()


def test_b14_the_end_in_five_segments(mail):
    with mail() as play:
        open_body(play)
        send(play.client, b"one\r\n.\r\nNOOP\r\n", bytewise=True)
        assert play.server.bytes(8) == b"one\r\n.\r\n"
        play.stored()
        play("S< NOOP")


def test_b16_client_leaves_after_one(mail):
    with mail() as play:
        open_body(play)
        play.client.send(HEAD)
        play.session.client.close()
        assert play.server.rest() == HEAD
        assert play.log.find("Transaction aborted")


@pytest.mark.parametrize("sequence", [b"\n.\n", b"\n.\r\n", b"\r\n.\n"], ids=["B1", "B2", "B5"])
def test_b_from_the_server(mail, sequence):
    with mail() as play:
        play.greet()
        play("""
            C> NOOP
            S< NOOP
        """)
        play.server.send(b"250 one" + sequence + b"250 fake\r\n")
        if sequence.startswith(b"\r\n"):  # the reply itself is sound, what follows is not
            play("""
                C< 250 one
                C> NOOP
            """)
        play(f"""
            C< {CLOSING}
            C|
            S|
        """)


# C: commands


def test_c01_lone_lf_between_commands(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play.client.send(b"RCPT TO:<a@b>\nDATA\r\n")
        play(f"""
            C< {CLOSING}
            C|
            S|
        """)
        assert play.log.has(
            "Error while fetching line; error='%s'", ("Invalid line, bad CRLF sequence, buffer=[RCPT TO:<a@b>]",)
        )
    with mail(open_smtp(require_crlf=0)) as play:
        play.greet()
        play.envelope()
        play.client.send(b"RCPT TO:<a@b>\nDATA\r\n")
        play("""
            S< RCPT To:<a@b>
            S> 250 ok
            C< 250 ok
            S< DATA
        """)


@pytest.mark.parametrize(
    "line",
    [
        b"HELO a\rMAIL FROM:<x@y>",
        b"MAIL FROM:<a@b\x00>",
        b"NOOP \x00x",
        b"MAIL FROM:<a\xe9@b>",
        b"MAIL FROM:<a@b> SIZE=-1",
        b"MAIL FROM:<a@b> SIZE=",
        b"MAIL FROM:<a@b> SIZE=99999999999999999999999",
    ],
    ids=["C2 CR", "C3 NUL", "C3 NUL in NOOP", "C5 8-bit", "C4 negative", "C4 empty", "C4 huge"],
)
def test_c02_to_c05_bytes_and_sizes(mail, line):
    with mail() as play:
        play.greet("SIZE")
        play.client.send(line + b"\r\n")
        play("C< 500 Invalid command")
        play.goes_on()


def test_c05_invalid_utf8_with_smtputf8(mail):
    with mail(open_smtp(permit=("SMTPUTF8",))) as play:
        play.greet("8BITMIME", "SMTPUTF8")
        play.client.send(b"MAIL FROM:<a\xc3(@b> SMTPUTF8\r\n")
        play("C< 500 Invalid command")
        play("""
            C> MAIL FROM:<\\xc3\\xa9@b>
            C< 553 Address needs SMTPUTF8
        """)
        play.goes_on()


@pytest.mark.parametrize("length", [511, 512, 513, 4094])
def test_c06_command_lines_up_to_the_buffer(mail, length):
    with mail() as play:
        play.greet()
        line = b"NOOP " + b"x" * (length - 5)
        play.client.send(line + b"\r\n")
        if length <= 512:
            assert play.server.line() == line + b"\r\n"
        else:
            play("C< 500 Invalid command")
            play.goes_on()


def test_c06_a_line_without_end_is_not_collected(mail):
    with mail() as play:
        play.greet()
        sender = threading.Thread(target=send, args=(play.client, b"A" * (10 << 20), False), daemon=True)
        sender.start()
        play(f"""
            C< {CLOSING}
            S|
        """)


def test_c07_starttls_is_refused_and_nothing_behind_it_is_special(mail):
    with mail() as play:
        assert play.greet("STARTTLS") == ["250 mx.example"]
        play.client.send(b"STARTTLS\r\nEHLO x\r\nMAIL FROM:<evil@x>\r\n")
        play("""
            C< 454 TLS not available due to temporary reason
            S< EHLO x
        """)


def test_c09_chunk_without_chunking_is_consumed(mail):
    with mail() as play:
        play.begin_chunks()
        play.client.send(b"BDAT 12 LAST\r\nRCPT TO:<z>\r")
        play.client.send(b"\nNOOP\r\n")
        # twelve octets are "RCPT TO:<z>" and its CR
        play(f"""
            C< 503 Invalid command in this state
            C< {CLOSING}
        """)
    with mail() as play:
        play.begin_chunks()
        play.client.send(b"BDAT 13 LAST\r\nRCPT TO:<z>\r\n")
        play("C< 503 Invalid command in this state")
        play.goes_on()


def test_c10_body_after_a_data_refused(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play.data_refused("554 no")
        play.client.send(b"Subject: t\r\n\r\nMail for you\r\n.\r\n")
        for _ in range(4):
            play("C< 500 Invalid command")
        play.client.send(b"More: lines\r\n" * 20)
        replies = play.client.rest().splitlines()
        assert replies[-1] == b"421 Too many errors"
        assert len(replies) == 17
        play("S|")


class RefusesData(OpenSmtp):
    def config(self):
        OpenSmtp.config(self)
        self.request["DATA"] = (SMTP_REQ_REJECT, "554", "no mail today")


def test_c10_body_after_data_was_refused_by_policy(mail):
    with mail(RefusesData) as play:
        play.greet()
        play.envelope()
        play.client.send(b"DATA\r\nSubject: t\r\nMAIL FROM:<x@y>\r\n")
        play("""
            C< 554 no mail today
            C< 500 Invalid command
            C< 503 Invalid command in this state
        """)
        play.goes_on()


@pytest.mark.parametrize(
    ("recipient", "reply"),
    [
        (b'<"x@ok.example"@evil>', "554 Relaying denied."),
        (b'<"a\\', "501 Invalid command"),
        (b"<@ok.example:a@evil>", "554 Relaying denied."),
        (b"<a%evil@ok.example>", "501 Malformed address"),
        (b"<evil!a@ok.example>", "501 Malformed address"),
        (b'<"a@evil"@ok.example>', "501 Malformed address"),
        (b'<"a\\@evil"@ok.example>', "501 Malformed address"),
        (b'<"@evil:a"@ok.example>', "501 Malformed address"),
        (b'<"a%evil"@ok.example>', "501 Malformed address"),
        (b'<"evil!a"@ok.example>', "501 Malformed address"),
    ],
    ids=["C11 quoted", "C11 unterminated", "C12 route", "C12 percent", "C12 exclamation", "quoted at", "escaped at",
         "quoted route", "quoted percent", "quoted exclamation"],
)
def test_c11_c12_addresses_are_judged_by_their_real_domain(mail, recipient, reply):
    with mail(open_smtp(relay_zones=(), relay_domains=("ok.example",))) as play:
        play.greet()
        play.envelope("a@ok.example")
        play.client.send(b"RCPT TO:" + recipient + b"\r\n")
        play(f"C< {reply}")
        play.goes_on()


@pytest.mark.parametrize(
    ("wire", "reply"),
    [
        (b"250 ok\r250 fake\r\n", "250 ok?250 fake"),
        (b"250-a\r\n550 b\r\n", CLOSING),
        (b"25x hi\r\n", CLOSING),
        (b"250\r\n", "250"),
        (b"199 a\r\n", CLOSING),
        (b"334 more\r\n", CLOSING),
        (b"25\r\n", CLOSING),
    ],
    ids=["CR", "code changes", "letters", "three digits", "code 199", "dialogue", "two digits"],
)
def test_c13_replies(mail, wire, reply):
    with mail() as play:
        play.greet()
        play("""
            C> NOOP
            S< NOOP
        """)
        play.server.send(wire)
        play(f"C< {reply}")
        if reply == CLOSING:
            play("""
                C|
                S|
            """)
        else:
            play.goes_on()


@pytest.mark.parametrize("together", [True, False], ids=["in one segment", "later"])
def test_c14_a_second_reply_never_answers_a_later_command(mail, together):
    with mail() as play:
        play.greet()
        play("""
            C> NOOP
            S< NOOP
        """)
        if together:
            play.server.send(b"250 one\r\n250 two\r\n")
            play("C< 250 one")
        else:
            play.server.send(b"250 one\r\n")
            play("C< 250 one")
            play.server.send(b"250 two\r\n")
            play.wait_until_the_server_is_heard()
        play(f"""
            C> MAIL FROM:<a@b>
            C< {CLOSING}
            C|
            S|
        """)
        assert play.log.find("Unsolicited response")


def test_c14_a_reply_behind_the_354_is_not_taken_for_the_acknowledgement(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play("""
            C> DATA
            S< DATA
        """)
        play.server.send(b"354 go\r\n250 stored already\r\n")
        play("C< 354 go")
        play.client.send(b"one\r\n.\r\n")
        play("C< 421 Service not available, closing transmission channel")
        assert b".\r\n" not in play.server.rest()


def test_c14_farewell_of_the_server_is_passed_on(mail):
    with mail() as play:
        play.greet()
        play("S> 421 mx.example going down")
        play.wait_until_the_server_is_heard()
        play(f"""
            C> NOOP
            C< {CLOSING}
            C|
        """)
        assert not play.log.find("Unsolicited response")


@pytest.mark.parametrize("line", [b"VRFY x", b"FOO", b"1", b"", b"MAIL FROM"])
def test_c15_too_many_errors(mail, line):
    with mail() as play:
        play.greet()
        send(play.client, (line + b"\r\n") * 1000, bytewise=False)
        replies = play.client.rest().splitlines()
        assert len(replies) == 21
        assert replies[-1] == b"421 Too many errors"


def test_c15_many_good_commands_are_fine(mail):
    with mail() as play:
        play.greet()
        for _ in range(100):
            play.goes_on()


def test_c16_client_that_talks_first_is_served_after_the_greeting(mail):
    with mail() as play:
        play("""
            C> EHLO client.example
            S> 220 mx.example ESMTP
            C< 220 mx.example ESMTP
            S< EHLO client.example
        """)


@pytest.mark.parametrize("delay", [0, 50])
def test_c16_client_that_talks_first_may_be_refused(mail, delay):
    with mail(open_smtp(refuse_early_talkers=1, greeting_delay=delay), start=False) as play:
        play.client.send(b"EHLO client.example\r\n")
        play.session.start()
        play("""
            S> 220 mx.example ESMTP
            C< 554 Protocol error, talking before the greeting
            C|
            S|
        """)


def test_c17_line_ends_in_error_info_are_removed(mail):
    class Careless(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request["VRFY"] = (SMTP_REQ_POLICY, self.vrfy)

        def vrfy(self, cmd, param):
            self.error_code, self.error_info = "550", "x\r\n250 y"
            return SMTP_REQ_REJECT

    with mail(Careless) as play:
        play.greet()
        play("""
            C> VRFY x
            C< 550 x250 y
        """)
        play.goes_on()


@pytest.mark.parametrize(
    ("cmd", "param"),
    [
        ("NOOP", "x\r\nDATA"),
        ("NOOP\r\nDATA", ""),
        ("NOOP", "x\0"),
        ("NO OP", ""),
        ("DATA", ""),
        ("NOOP", "\u20ac"),
        ("AUTH", "PLAIN"),
    ],
)
def test_a_policy_cannot_send_two_commands_as_one(mail, cmd, param):
    class Careless(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request["XTEST"] = (SMTP_REQ_POLICY, self.xtest)

        def xtest(self, _cmd, _param):
            self.request_cmd = cmd
            self.request_param = param
            return SMTP_REQ_ACCEPT

    with mail(Careless) as play:
        play.greet()
        play(f"""
            C> XTEST
            C< {CLOSING}
            C|
            S|
        """)
    assert play.session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_c18_a_failed_authentication_ends_the_dialogue_whatever_its_code(mail):
    with mail(open_smtp(relay_zones=())) as play:
        play.begin_login()
        play("""
            C> dXNlcg==
            S< dXNlcg==
            S> 559 no
            C< 550 Requested action not taken
            C> MAIL FROM:<x@y>
            S< MAIL From:<x@y>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<a@denied>
            C< 554 Relaying denied.
        """)
        play.goes_on()


@pytest.mark.parametrize("verb", ["TURN", "ATRN", "XCLIENT", "XFORWARD", "XEXCH50", "BURL", "VERB", "ONEX"])
def test_verbs_that_change_the_session_pass_only_by_name(mail, verb):
    class Everything(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request["*"] = SMTP_REQ_ACCEPT
            self.extensions["*"] = SMTP_EXT_ACCEPT

    class Named(Everything):
        def config(self):
            Everything.config(self)
            self.request[verb] = SMTP_REQ_ACCEPT

    with mail(Everything) as play:
        assert play.greet(verb, "DSN") == ["250-mx.example", "250 DSN"]
        play(f"""
            C> {verb} x
            C< 502 Command not implemented
        """)
        play.goes_on()
    with mail(Named) as play:
        play.greet()
        play(f"""
            C> {verb} x
            S< {verb} x
        """)


def test_chunk_of_unknown_size_ends_the_session(mail):
    for argument in ("x", "-1", "99999999999", "2147483648", "1\\x00", "1\\t", "1" + " " * 600 + "x"):
        with mail(open_smtp(permit=("CHUNKING",))) as play:
            play.begin_chunks()
            play(f"""
                C> BDAT {argument}
                C< 501 Invalid BDAT command, closing transmission channel
                C|
                S|
            """)


def test_proxy_header_from_anybody_is_an_unknown_command(mail):
    with mail() as play:
        play.greet()
        play("""
            C> PROXY TCP4 1.2.3.4 5.6.7.8 1 2
            C< 500 Invalid command
        """)
        play.goes_on()


def test_slow_command_is_not_waited_for_longer_than_its_time(mail):
    with mail(open_smtp(command_timeout=200)) as play:
        play.greet()
        play.client.send(b"NO")
        play(f"""
            C< {CLOSING}
            C|
            S|
        """)
