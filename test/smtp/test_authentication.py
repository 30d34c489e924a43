"""AUTH: results equal those of a direct connection, nothing but SASL passes, and no secret is logged."""

from __future__ import annotations

import base64

import pytest

from test.smtp.play import CLOSING, open_smtp
from test.smtp.test_tables import with_tables
from Zorp.Smtp import SMTP_REQ_ACCEPT, SMTP_REQ_POLICY, SMTP_RSP_REJECT

SECRET = base64.b64encode(b"\0user\0very secret").decode()
USER, PASSWORD = base64.b64encode(b"user").decode(), base64.b64encode(b"very secret").decode()


def nothing_secret_in(log):
    text = "\n".join(log.texts())
    return not any(secret in text for secret in (SECRET, USER, PASSWORD, PASSWORD.upper(), USER.upper()))


def test_33_plain_with_initial_response(mail):
    with mail() as play:
        play.greet("AUTH PLAIN LOGIN")
        play(f"""
            C> AUTH PLAIN {SECRET}
            S< AUTH PLAIN {SECRET}
            S> 235 welcome
            C< 235 welcome
        """)
        play.send_mail()
        assert nothing_secret_in(play.log)
        assert play.log.has("Authentication successful; mechanism='%s'", ("PLAIN",))


def test_33_login(mail):
    with mail() as play:
        play.greet("AUTH PLAIN LOGIN")
        play(f"""
            C> AUTH LOGIN
            S< AUTH LOGIN
            S> 334 VXNlcm5hbWU6
            C< 334 VXNlcm5hbWU6
            C> {USER}
            S< {USER}
            S> 334 UGFzc3dvcmQ6
            C< 334 UGFzc3dvcmQ6
            C> {PASSWORD}
            S< {PASSWORD}
            S> 535 wrong
            C< 535 wrong
        """)
        play.send_mail()
        assert nothing_secret_in(play.log)
        assert play.log.has("Authentication failed; mechanism='%s', response='%d'", ("LOGIN", 535))


def test_33_cancelled(mail):
    with mail() as play:
        play.begin_login()
        play("""
            C> *
            S< *
            S> 501 cancelled
            C< 501 cancelled
        """)
        play.goes_on()


@pytest.mark.parametrize(("line", "reply"), [
    (b"MAIL FROM:<a@b>", "501 Invalid authentication request"), (b"a=b", "501 Invalid authentication request"),
    (b"x" * 12289, "500 Invalid command"), (b"\0", "501 Invalid authentication request"),
], ids=["command", "not base64", "too long", "NUL"])
def test_line_that_is_not_sasl_cancels(mail, line, reply):
    with mail() as play:
        play.begin_login()
        play.client.send(line + b"\r\n")
        play(f"""
            S< *
            S> 501 cancelled
            C< {reply}
        """)
        play.goes_on()


def test_long_tokens_pass(mail):
    token = "x" * 12000
    with mail() as play:
        play.greet("AUTH XOAUTH2")
        play(f"""
            C> AUTH XOAUTH2 {token}
            S< AUTH XOAUTH2 {token}
            S> 334 more
            C< 334 more
            C> {token}
            S< {token}
            S> 235 welcome
            C< 235 welcome
        """)


def test_other_long_lines_do_not(mail):
    with mail() as play:
        play.greet("AUTH PLAIN")
        play.client.send(b"NOOP " + b"x" * 4090 + b"\r\n")
        play(f"""
            C< {CLOSING}
            C|
        """)


def test_a_dialogue_without_end_is_ended(mail):
    with mail() as play:
        play.begin_login()
        for _ in range(20):
            play("""
                C> eA==
                S< eA==
                S> 334 bW9yZQ==
                C< 334 bW9yZQ==
            """)
        play("""
            C> eA==
            S< *
            S> 501 cancelled
            C< 501 Invalid authentication request
        """)
        play.goes_on()


def test_once_per_session(mail):
    with mail() as play:
        play.greet("AUTH PLAIN")
        play(f"""
            C> AUTH PLAIN {SECRET}
            S< AUTH PLAIN {SECRET}
            S> 235 welcome
            C< 235 welcome
            C> AUTH PLAIN {SECRET}
            C< 503 Already authenticated
        """)


def test_not_inside_a_transaction_and_not_unless_offered(mail):
    with mail() as play:
        play.greet()
        play(f"""
            C> AUTH PLAIN {SECRET}
            C< 500 Invalid command
            C> AUTH
            C< 501 Invalid command
        """)
        play.envelope()
        play(f"""
            C> AUTH PLAIN {SECRET}
            C< 503 Invalid command in this state
        """)
        assert nothing_secret_in(play.log)


def test_mechanisms_can_be_limited(mail):
    with mail(open_smtp(auth_mechanisms=("plain",))) as play:
        assert play.greet("AUTH PLAIN LOGIN", "AUTH=LOGIN PLAIN") == [
            "250-mx.example", "250-AUTH PLAIN", "250 AUTH PLAIN"]
        play("""
            C> AUTH LOGIN
            C< 504 Authentication mechanism not permitted
        """)
        play.goes_on()


def test_auth_can_be_hidden_from_clients_without_tls(mail):
    with mail(open_smtp(auth_requires_tls=1)) as play:
        assert play.greet("AUTH PLAIN", "SIZE 5") == ["250-mx.example", "250 SIZE 5"]
        play(f"""
            C> AUTH PLAIN {SECRET}
            C< 500 Invalid command
        """)


def test_refused_challenge_is_cancelled_at_the_server(mail):
    with mail(with_tables(response={("AUTH", "334"): (SMTP_RSP_REJECT, "535", "no")})) as play:
        play.greet("AUTH LOGIN")
        play("""
            C> AUTH LOGIN
            S< AUTH LOGIN
            S> 334 VXNlcm5hbWU6
            S< *
            S> 501 cancelled
            C< 535 no
        """)
        play.goes_on()


def test_refused_success_ends_the_session(mail):
    with mail(with_tables(response={("AUTH", "235"): (SMTP_RSP_REJECT, "535", "no")})) as play:
        play.greet("AUTH PLAIN")
        play(f"""
            C> AUTH PLAIN {SECRET}
            S< AUTH PLAIN {SECRET}
            S> 235 welcome
            C< 535 no
            C|
            S|
        """)


def test_server_that_goes_on_after_the_cancel_is_left(mail):
    with mail() as play:
        play.begin_login()
        play(f"""
            C> not sasl
            S< *
            S> 334 more
            C< {CLOSING}
            C|
            S|
        """)


@pytest.mark.parametrize("line", [PASSWORD, "c2VjcmV0", "c2VjcmV0=="])
def test_secret_sent_too_late_is_not_logged(mail, line):
    with mail() as play:
        play.greet("AUTH LOGIN")
        play("""
            C> AUTH LOGIN
            S< AUTH LOGIN
            S> 535 no
            C< 535 no
        """)
        play(f"""
            C> {line}
            C< 500 Invalid command
        """)
        play.goes_on()
        text = "\n".join(play.log.texts())
        assert line not in text
        assert line.upper() not in text


def test_policy_may_read_the_credentials_but_the_log_does_not_show_them(mail):
    seen = []

    def callback(self, cmd, param):
        seen.append((param, self.request_param))
        return SMTP_REQ_ACCEPT

    with mail(with_tables({"AUTH": (SMTP_REQ_POLICY, "=callback")}, callback=callback)) as play:
        play.greet("AUTH PLAIN")
        play(f"""
            C> AUTH PLAIN {SECRET}
            S< AUTH PLAIN {SECRET}
        """)
        assert nothing_secret_in(play.log)
    assert seen == [(f"PLAIN {SECRET}", f"PLAIN {SECRET}")]


@pytest.mark.parametrize("end", [b"\n", b"x" * 20_000])
@pytest.mark.parametrize("moment", ["command", "dialogue", "too late"])
def test_line_with_a_secret_that_cannot_be_read_is_not_logged(mail, moment, end):
    with mail() as play:
        play.greet("AUTH LOGIN PLAIN")
        if moment != "command":
            play(f"""
                C> AUTH LOGIN
                S< AUTH LOGIN
                S> {"334 eA==" if moment == "dialogue" else "535 no"}
                C< {"334 eA==" if moment == "dialogue" else "535 no"}
            """)
        play.client.send((b"AUTH PLAIN " if moment == "command" else b"") + SECRET.encode() + end)
        play(f"""
            C< {CLOSING}
            C|
        """)
        assert play.log.find("Error while fetching line")
        assert nothing_secret_in(play.log)


def test_a_reply_nobody_asked_for_is_no_answer_to_a_sasl_line(mail):
    # given a server that has said the outcome before the client's secret
    with mail() as play:
        play.greet("AUTH LOGIN")
        play.client.send(b"AUTH LOGIN\r\n")
        play("S< AUTH LOGIN")
        play.server.send(b"334 VXNlcm5hbWU6\r\n235 ok\r\n")
        play("C< 334 VXNlcm5hbWU6")
        # when the client goes on
        play.client.send(b"bmFtZQ==\r\n")
        # then nobody is logged in: the session ends, and the server never sees the line
        play("C< 421 Service not available, closing transmission channel.")
        assert play.server.rest() == b""
    assert not play.log.find("Authentication successful")


@pytest.mark.parametrize("line", [
    f"AUTH PLAIN {SECRET}\\xe9", f"AUTH PLAIN \\0user\\0{PASSWORD}", f"AUTH\\tPLAIN {SECRET}", f" AUTH PLAIN {SECRET}",
    f"\\0auth PLAIN {SECRET}", f"NOOP\\rAUTH PLAIN {SECRET}"])
def test_a_line_of_auth_that_is_no_command_is_not_logged(mail, line):
    with mail() as play:
        play.greet("AUTH PLAIN")
        play(f"""
            C> {line}
            C< 500 Invalid command
        """)
        assert any("in request; line='(hidden)'" in text for text in play.log.texts())
        assert nothing_secret_in(play.log)
        # nor is what the client sends behind it
        play(f"""
            C> {PASSWORD}
            C< 500 Invalid command
        """)
        play.goes_on()
        assert nothing_secret_in(play.log)


@pytest.mark.parametrize("offered", [True, False], ids=["refused by the server", "not offered"])
@pytest.mark.parametrize("late", [(USER, PASSWORD), ("user@x", PASSWORD), ("user", "very secret"), ("", PASSWORD)])
def test_all_secrets_of_a_login_that_did_not_wait_are_kept_out_of_the_log(mail, late, offered):
    # given a client that sends its login in one go
    with mail() as play:
        play.greet(*["AUTH LOGIN"] * offered)
        play.client.send("".join(f"{line}\r\n" for line in ("AUTH LOGIN", *late)).encode())
        # when it is refused
        play("""
            S< AUTH LOGIN
            S> 504 not supported
            C< 504 not supported
        """ if offered else "C< 500 Invalid command")
        play("""
            C< 500 Invalid command
            C< 500 Invalid command
        """)
        # then no line of it is in the log, at any verbosity
        text = "\n".join(play.log.texts()).upper()
        assert not any(word.upper() in text for word in late if word)
        # and from the next command on lines are shown again
        play.goes_on()
        play("""
            C> XYZ
            C< 500 Invalid command
        """)
        assert play.log.find("Unknown command; request='XYZ'")


def test_a_second_line_after_auth_that_has_no_end_is_not_logged(mail):
    with mail() as play:
        play.greet("AUTH LOGIN")
        play.client.send(f"AUTH LOGIN\r\nx\r\n{PASSWORD}\n".encode())
        play(f"""
            S< AUTH LOGIN
            S> 504 not supported
            C< 504 not supported
            C< 500 Invalid command
            C< {CLOSING}
        """)
        assert play.log.find("Error while fetching line")
        assert nothing_secret_in(play.log)
