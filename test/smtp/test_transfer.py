"""Messages on their way: what can go wrong with DATA and BDAT, and what client, server and log get to know of it."""

from __future__ import annotations

import select

import pytest

from test.smtp.play import CLOSING, open_smtp
from test.smtp.test_tables import with_tables
from test.support.ends import reset
from Zorp.Smtp import SMTP_REQ_ACCEPT, SMTP_REQ_POLICY, SMTP_RSP_REJECT
from Zorp.smtp_engine import transfer
from Zorp.smtp_engine.session import portions_of

FAILED = "421 Service not available, closing transmission channel"


def accounting(play, count=1):
    """Return (sender, recipients, response, text, result) of the count-th message, once it is logged."""
    return play.log.wait_for("Accounting; ", count).arguments


def open_body(play, *extensions):
    play.greet(*extensions)
    play.envelope()
    play.data()


def test_message_refused_at_its_end(mail):
    with mail() as play:
        open_body(play)
        play.body(b"one\r\n.\r\n")
        play("""
            S> 552 too large
            C< 552 too large
        """)
        play.send_mail()
        assert accounting(play) == ("a@x.example", "b@y.example", "552", "too large", "failure")
        assert play.log.find("Server rejected our message; response='552', response_param='too large'")


def test_acknowledgement_refused_by_policy(mail):
    with mail(with_tables(response={("DATA", "251"): (SMTP_RSP_REJECT, "550", "no")})) as play:
        open_body(play)
        play.body(b"one\r\n.\r\n")
        play("""
            S> 251 stored
            C< 550 no
        """)
        play.send_mail()
        assert accounting(play)[2:] == ("550", "no", "failure")


@pytest.mark.parametrize(("answer", "text"), [
    (None, "Error fetching acknowledgement response from server;"),
    (b"x\r\n", "Error processing acknowledgement response from server;"),
    (b"354 more\r\n", "Invalid SMTP response; request='DATA', response='354'"),
], ids=["none", "no reply", "dialogue"])
def test_acknowledgement_that_is_none(mail, answer, text):
    with mail() as play:
        open_body(play)
        play.body(b"one\r\n.\r\n")
        if answer is None:
            play.session.server.close()
        else:
            play.server.send(answer)
        play(f"""
            C< {CLOSING}
            C|
        """)
        assert play.log.find(text)
        assert accounting(play)[-1] == "failure"


def test_client_that_leaves_before_the_acknowledgement(mail):
    with mail() as play:
        open_body(play)
        play.body(b"one\r\n.\r\n")
        reset(play.session.client)
        play("S> 250 stored")
        play.session.wait_for_end()
        assert accounting(play)[-1] == "success"


def test_data_with_an_argument(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play("""
            C> DATA now
            C< 501 Invalid command
        """)
        play.data()


def test_new_message_after_data_was_refused(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play.data_refused("451 later")
        play("""
            C> RCPT TO:<more@y.example>
            S< RCPT To:<more@y.example>
            S> 250 ok
            C< 250 ok
        """)
        play.data()
        play.body(b"one\r\n.\r\n")
        play.stored()
        assert accounting(play, 2)[1] == "b@y.example more@y.example"


def test_server_that_refuses_while_the_body_is_on_its_way(mail):
    with mail() as play:
        open_body(play)
        play.client.send(b"one\r\ntwo\r\n")
        assert play.server.bytes(8) == b"one\r\ntwo"
        play("S> 552 enough")
        play.wait_until_the_server_is_heard()
        play.client.send(b"three\r\n.\r\n")
        play("C< 552 enough")
        assert b".\r\n" not in play.server.rest()
        # the server is gone, the session is not
        play("""
            C> NOOP
            C< 503 Server not available
            C> QUIT
            C< 221 Bye
            C|
        """)
        assert accounting(play)[2:] == ("552", "enough", "failure")


def test_server_that_leaves_while_the_body_is_on_its_way(mail):
    with mail() as play:
        open_body(play)
        play.client.send(b"one\r\ntwo\r\n")
        assert play.server.bytes(8) == b"one\r\ntwo"
        play.session.server.close()
        play.wait_until_the_server_is_heard()
        for _ in range(3):
            play.client.send(b"more\r\n")
        play.client.send(b".\r\n")
        play(f"""
            C< {FAILED}
            C> NOOP
            C< 503 Server not available
        """)
        assert play.log.find("Transaction failed, some data may have been sent;")
        assert accounting(play)[-1] == "failure"


def test_silent_client_in_the_body(mail):
    with mail(open_smtp(timeout=300)) as play:
        open_body(play)
        play.client.send(b"one\r\n")
        play(f"""
            C< {FAILED}
            C|
        """)
        assert b".\r\n" not in play.server.rest()
        assert play.log.has("Data transfer timed out; timeout='%d'", (300,))


def test_too_large_message_is_swallowed(mail):
    with mail(open_smtp(max_message_size=100)) as play:
        assert play.greet("SIZE 1000") == ["250-mx.example", "250 SIZE 100"]
        play("""
            C> MAIL FROM:<a@b> SIZE=101
            C< 552 Message size exceeds fixed limit
        """)
        play.envelope()
        play.data()
        play.client.send(b"x" * 98 + b"\r\n")
        play.client.send(b"y\r\n.\r\nNOOP\r\n")
        play("""
            C< 552 Message size exceeds fixed limit
            C< 503 Server not available
        """)
        assert b".\r\n" not in play.server.rest()
        assert accounting(play)[2:] == ("552", "Message size exceeds fixed limit", "failure")


def test_nul_in_a_body(mail):
    with mail(open_smtp(permit_nul_in_body=1)) as play:
        open_body(play)
        play.body(b"a\0b\r\n.\r\n")
        play.stored()


def test_line_of_a_body_longer_than_permitted(mail):
    with mail(open_smtp(max_body_line_length=998)) as play:
        open_body(play)
        play.client.send(b"x" * 999 + b"\r\n.\r\n")
        play("C< 550 Mail body error (probably incorrect CRLF sequence)")


def test_errors_are_forgiven_after_a_message(mail):
    with mail(open_smtp(max_errors=2)) as play:
        play.greet()
        for _ in range(3):
            play("""
                C> FOO
                C< 500 Invalid command
            """)
            play.send_mail()


def test_recipients_are_limited(mail):
    with mail(open_smtp(max_recipients=2)) as play:
        play.greet()
        play.envelope("b@y.example", "c@y.example")
        play("""
            C> RCPT TO:<d@y.example>
            C< 452 Too many recipients
        """)
        play.data()


def test_sender_and_recipients_can_be_read(mail):
    seen = []

    def callback(self, cmd, param):
        seen.append((self.sender, self.recipients))
        return SMTP_REQ_ACCEPT

    with mail(with_tables({"NOOP": (SMTP_REQ_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play.goes_on()
        play.envelope("b@y.example", "c@y.example")
        play.goes_on()
        play("""
            C> RSET
            S< RSET
            S> 250 ok
            C< 250 ok
        """)
        play.goes_on()
    assert seen == [("", ""), ("a@x.example", "b@y.example c@y.example"), ("", "")]


# BDAT

def chunking(**settings):
    return open_smtp(permit=("CHUNKING", "BINARYMIME", "8BITMIME"), **settings)


def test_chunk_in_many_segments(mail):
    octets = bytes(range(256)) * 1000
    with mail(chunking()) as play:
        play.begin_chunks()
        play.client.send(b"BDAT %d LAST\r\n" % len(octets))
        for position in range(0, len(octets), 10_000):
            play.client.send(octets[position:position + 10_000])
        play(f"S< BDAT {len(octets)} LAST")
        assert play.server.bytes(len(octets)) == octets
        play.stored()
        play.goes_on()
        assert accounting(play)[-1] == "success"


def test_chunk_with_the_next_command_in_one_segment(mail):
    with mail(chunking()) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 3\r\nabcBDAT 2 LAST\r\ndeNOOP\r\n")
        play("S< BDAT 3")
        assert play.server.bytes(3) == b"abc"
        play("""
            S> 250 three
            C< 250 three
            S< BDAT 2 LAST
        """)
        assert play.server.bytes(2) == b"de"
        play("""
            S> 250 stored
            C< 250 stored
            S< NOOP
        """)


def test_refused_chunk_is_consumed_and_ends_the_message(mail):
    with mail(chunking()) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 3\r\nabcBDAT 6 LAST\r\nNOOP\r\nRSET\r\n")
        play("S< BDAT 3")
        assert play.server.bytes(3) == b"abc"
        play("""
            S> 552 no
            C< 552 no
            C< 503 Invalid command in this state
            S< RSET
        """)
        assert accounting(play)[2:] == ("552", "no", "failure")


def test_data_and_bdat_do_not_mix(mail):
    with mail(chunking()) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 0\r\n")
        play("""
            S< BDAT 0
            S> 250 ok
            C< 250 ok
            C> DATA
            C< 503 Invalid command in this state
        """)


def test_binary_message_needs_bdat(mail):
    with mail(chunking()) as play:
        play.greet("CHUNKING", "BINARYMIME", "8BITMIME")
        play("""
            C> MAIL FROM:<a@b> BODY=BINARYMIME
            S< MAIL From:<a@b> BODY=BINARYMIME
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<c@d>
            S< RCPT To:<c@d>
            S> 250 ok
            C< 250 ok
            C> DATA
            C< 503 BODY=BINARYMIME needs BDAT
        """)
        play.client.send(b"BDAT 2 LAST\r\n\0\n")
        play("S< BDAT 2 LAST")
        assert play.server.bytes(2) == b"\0\n"


def test_chunks_are_decided_like_data_unless_named(mail):
    policy = with_tables({"DATA": (3, "550", "no mail")}, extensions={"CHUNKING": 1})
    with mail(policy) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 6 LAST\r\nNOOP\r\n")
        play("C< 550 no mail")
        play.goes_on()
    with mail(with_tables({"*": (3, "550", "star")}, extensions={"CHUNKING": 1})) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 6 LAST\r\nNOOP\r\n")
        play("S< BDAT 6 LAST")
    with mail(with_tables({"BDAT": (3, "550", "no chunks")}, extensions={"CHUNKING": 1})) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 6 LAST\r\nNOOP\r\n")
        play("C< 550 no chunks")
        play.data()


def test_chunks_count_for_the_size(mail):
    with mail(chunking(max_message_size=5)) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 3\r\nabcBDAT 3\r\ndef")
        play("S< BDAT 3")
        assert play.server.bytes(3) == b"abc"
        play("""
            S> 250 ok
            C< 250 ok
            S< RSET
            S> 250 ok
            C< 552 Message size exceeds fixed limit
        """)
        play.send_mail(b"x\r\n.\r\n")


def test_client_that_leaves_in_the_middle_of_a_chunk(mail):
    with mail(chunking()) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 100 LAST\r\nabc")
        play.session.client.close()
        assert play.server.rest() == b"BDAT 100 LAST\r\nabc"
        play.session.wait_for_end()
        assert accounting(play)[-1] == "failure"


def test_server_that_leaves_in_the_middle_of_a_chunk(mail):
    with mail(chunking()) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 1000 LAST\r\nabc")
        play("S< BDAT 1000 LAST")
        assert play.server.bytes(3) == b"abc"
        reset(play.session.server)
        play.wait_until_the_server_is_heard()
        play.client.send(b"x" * 100)
        play(f"""
            C< {CLOSING}
            C|
        """)


def test_reply_nobody_asked_for_before_a_chunk(mail):
    with mail(chunking()) as play:
        play.begin_chunks()
        play("S> 250 too early")
        play.wait_until_the_server_is_heard()
        play.client.send(b"BDAT 3 LAST\r\nabc")
        play(f"""
            C< {CLOSING}
            C|
            S|
        """)


def test_chunk_reply_refused_by_policy(mail):
    policy = with_tables(response={("BDAT", "251"): (SMTP_RSP_REJECT, "550", "no")}, extensions={"CHUNKING": 1})
    with mail(policy) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 0\r\n")
        play("""
            S< BDAT 0
            S> 251 ok
            S< RSET
            S> 250 ok
            C< 550 no
            C> BDAT 0 LAST
            C< 503 Invalid command in this state
        """)


def test_chunk_reply_rewritten_to_a_refusal_resets_the_server(mail):
    def callback(self, *_arguments):
        self.response_code, self.response_param = "550", "not so"
        return 1

    policy = with_tables(response={("BDAT", "251"): (6, "=callback")}, extensions={"CHUNKING": 1}, callback=callback)
    with mail(policy) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 0\r\n")
        play("""
            S< BDAT 0
            S> 251 ok
            S< RSET
            S> 250 ok
            C< 550 not so
        """)


def test_body_slower_than_permitted(mail, monkeypatch):
    monkeypatch.setattr(transfer, "_PACE_GRACE_SECONDS", 0)
    with mail(open_smtp(min_data_rate=1_000_000_000)) as play:
        open_body(play)
        play.client.send(b"slow\r\n")
        play(f"C< {FAILED}")
        assert b".\r\n" not in play.server.rest()


def too_large(play):
    open_body(play)
    play.client.send(b"x" * 200 + b"\r\n")


def server_left(play):
    open_body(play)
    play.session.server.close()
    play.wait_until_the_server_is_heard()
    play.client.send(b"x\r\n" * 2)


def chunk_without_a_message(play):
    play.greet("CHUNKING")
    play.client.send(b"BDAT 2000000000 LAST\r\n")


def chunk_without_a_server(play):
    play("""
        S> 554 go away
        C< 554 go away
    """)
    play.client.send(b"BDAT 2000000000 LAST\r\n")


@pytest.mark.parametrize("begin", [too_large, server_left, chunk_without_a_message, chunk_without_a_server])
def test_a_client_may_not_trickle_for_ever_what_is_dropped(mail, monkeypatch, begin):
    monkeypatch.setattr(transfer, "_PACE_GRACE_SECONDS", 0.5)
    # given a body that is read only to be dropped
    with mail(chunking(min_data_rate=1_000_000, max_message_size=100)) as play:
        begin(play)
        # when the client sends a byte now and then
        for _ in range(100):
            play.client.send(b"x")
            if select.select([play.session.client], [], [], 0.1)[0]:
                break
        # then it is left, as in any other body
        assert play.client.line().startswith(FAILED.encode())
        play("C|")
        assert play.log.find("Data transfer timed out")


# the accounting of many recipients


def test_no_recipient_is_missing_from_the_accounting(mail):
    # given a message with 90 recipients, more than a value of the log has room for
    recipients = [f"somebody-with-a-name-{number:03}@department.y.example" for number in range(90)]
    with mail() as play:
        play.greet()
        play.envelope(*recipients)
        play.data()
        play.body(b"one\r\n.\r\n")
        play.stored()
        play.quit()
    # then the lines of its accounting have them all, each in one of them, and are alike otherwise
    lines = play.log.find("Accounting; ")
    assert len(lines) > 1
    assert " ".join(line.arguments[1] for line in lines).split(" ") == recipients
    assert {(line.arguments[0], *line.arguments[2:]) for line in lines} == {("a@x.example", "250", "stored", "success")}
    assert "(cut)" not in "".join(line.text for line in lines)


@pytest.mark.parametrize("recipients", [
    ["a@b"] * 3000,
    ["o'brien@y.example"] * 500,
    [f'"with a blank {number}"@y.example' for number in range(300)],
    ["x" * 5000, "y@z"],
    ["no-at"] * 2000,
    [""] * 5000,
], ids=["short", "quotes", "blanks", "one too long", "no domain", "nothing"])
def test_portions_hold_everything_and_fit(recipients):
    text = " ".join(recipients)
    portions = portions_of(text)
    assert " ".join(portions) == text
    fitting = [portion for portion in portions if "x" * 5000 not in portion]
    assert all(len(portion.replace("'", "<27>")) <= 2048 for portion in fitting)
    if recipients[0].startswith('"with'):
        assert all(portion.startswith('"with') and portion.endswith("@y.example") for portion in portions)
