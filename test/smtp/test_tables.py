"""The policy's tables: every form of an entry, every result of a callback."""

from __future__ import annotations

import pytest

from test.smtp.play import CLOSING, OpenSmtp
from Zorp.Smtp import (
    SMTP_EXT_ACCEPT,
    SMTP_EXT_DROP,
    SMTP_REQ_ABORT,
    SMTP_REQ_ACCEPT,
    SMTP_REQ_POLICY,
    SMTP_REQ_REJECT,
    SMTP_RSP_ABORT,
    SMTP_RSP_ACCEPT,
    SMTP_RSP_POLICY,
    SMTP_RSP_REJECT,
    AbstractSmtpProxy,
)


def with_tables(request=(), response=(), extensions=(), base=OpenSmtp, **methods):
    """Return a policy class with these entries; a string as last item of an entry names one of `methods`."""

    def entry(proxy, value):
        if isinstance(value, tuple):
            return tuple(
                getattr(proxy, item[1:]) if isinstance(item, str) and item[:1] == "=" else item for item in value
            )
        return value

    def config(self):
        base.config(self)
        for table, entries in ((self.request, request), (self.response, response), (self.extensions, extensions)):
            for key, value in dict(entries).items():
                table[key] = entry(self, value)

    return type("Tabled", (base,), {"config": config, **methods})


# requests


@pytest.mark.parametrize("value", [SMTP_REQ_ACCEPT, (SMTP_REQ_ACCEPT,), [SMTP_REQ_ACCEPT]], ids=repr)
def test_accept(mail, value):
    with mail(with_tables({"XTEST": value})) as play:
        play.greet()
        play("""
            C> XTEST a  b
            S< XTEST a  b
            S> 250 fine
        """)


@pytest.mark.parametrize(
    ("value", "reply"),
    [
        (SMTP_REQ_REJECT, "500 Invalid command"),
        ((SMTP_REQ_REJECT,), "500 Invalid command"),
        ((SMTP_REQ_REJECT, "550"), "550 Invalid command"),
        ((SMTP_REQ_REJECT, "550", "go away"), "550 go away"),
        ([SMTP_REQ_REJECT, "550", "go away"], "550 go away"),
        ((SMTP_REQ_REJECT, 550, "go away"), "550 go away"),
        ((SMTP_REQ_REJECT, "oops", "go away"), "500 go away"),
        ((SMTP_REQ_REJECT, "354", "go on"), "500 go on"),
    ],
    ids=repr,
)
def test_reject(mail, value, reply):
    with mail(with_tables({"XTEST": value})) as play:
        play.greet()
        play(f"""
            C> XTEST
            C< {reply}
        """)
        play.goes_on()
        assert play.log.has("Request not allowed by policy; request='%s', verdict='%d'", ("XTEST", 3))
        assert play.log.has("Unknown command; request='%s'", ("XTEST",))


def test_abort(mail):
    for verb in ("XTEST", "RSET"):
        with mail(with_tables({verb: SMTP_REQ_ABORT})) as play:
            play.greet()
            play(f"""
                C> {verb}
                C< {CLOSING}
                C|
                S|
            """)
        assert play.session.verdict == "ABORTED_BY_POLICY_ACTION"
        assert play.log.has("Request not allowed by policy; request='%s', verdict='%d'", (verb, 4))


@pytest.mark.parametrize("value", ["accept", ("accept",), (), 2, 5, 0, 99, None, 1.0], ids=repr)
def test_what_is_no_action_ends_the_session(mail, value):
    with mail(with_tables({"NOOP": value})) as play:
        play.greet()
        if value is None:  # no entry
            play("""
                C> NOOP
                C< 500 Invalid command
            """)
            return
        play(f"""
            C> NOOP
            C< {CLOSING}
            C|
            S|
        """)
        assert play.log.has("Invalid request policy type; request='%s'", ("NOOP",))
    assert play.session.verdict == "INVALID_POLICY_CALL"


@pytest.mark.parametrize(
    "value",
    [
        SMTP_REQ_POLICY,
        (SMTP_REQ_POLICY,),
        (SMTP_REQ_POLICY, "x"),
        (SMTP_REQ_POLICY, len, len),
        (SMTP_REQ_REJECT, "1", "2", "3"),
    ],
    ids=repr,
)
def test_malformed_tuple_ends_the_session(mail, value):
    with mail(with_tables({"NOOP": value})) as play:
        play.greet()
        play(f"""
            C> NOOP
            C< {CLOSING}
            C|
            S|
        """)
        assert play.log.has("Error in request policy; request='%s'", ("NOOP",))
    assert play.session.verdict == "INVALID_POLICY_CALL"


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (SMTP_REQ_ACCEPT, "passes"),
        (True, "passes"),
        (SMTP_REQ_REJECT, "refused"),
        (SMTP_REQ_ABORT, "ends"),
        (0, "ends"),
        (2, "ends"),
        (5, "ends"),
        (99, "ends"),
        (None, "ends"),
        ("1", "ends"),
    ],
    ids=repr,
)
def test_callback_verdict(mail, verdict, outcome):
    def callback(self, cmd, param):
        assert (cmd, param, self.request_cmd, self.request_command, self.request_param) == (
            "NOOP",
            "x y",
            "NOOP",
            "NOOP",
            "x y",
        )
        self.error_code, self.error_info = "550", "by callback"
        return verdict

    with mail(with_tables({"NOOP": (SMTP_REQ_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play("C> NOOP x y")
        if outcome == "passes":
            play("S< NOOP x y")
        elif outcome == "refused":
            play("C< 550 by callback")
        else:
            play(f"""
                C< {CLOSING}
                C|
                S|
            """)
            assert play.session.verdict == "ABORTED_BY_POLICY_ACTION"


@pytest.mark.parametrize("problem", [ValueError("x"), SystemExit(3), KeyError("x")], ids=repr)
def test_callback_that_raises_ends_the_session(mail, problem):
    def callback(self, cmd, param):
        raise problem

    with mail(with_tables({"NOOP": (SMTP_REQ_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play(f"""
            C> NOOP
            C< {CLOSING}
            C|
            S|
        """)
    assert play.session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_callback_gets_the_rewritten_argument_and_defaults(mail):
    seen = []

    def callback(self, cmd, param):
        seen.append((cmd, param, self.error_code, self.error_info, self.sender))
        return SMTP_REQ_REJECT

    with mail(with_tables({"MAIL": (SMTP_REQ_POLICY, "=callback")}, callback=callback)) as play:
        play.greet("SIZE")
        play("""
            C> mail from:  <@h:a@b>   size=5
            C< 500 Invalid command
        """)
    assert seen == [("MAIL", "From:<a@b> SIZE=5", "500", "Invalid command", "a@b")]


def test_reply_is_judged_under_the_new_verb_and_the_state_moves_by_the_old(mail):
    def callback(self, cmd, param):
        self.request_command = "XNOOP"
        return SMTP_REQ_ACCEPT

    policy = with_tables(
        {"NOOP": (SMTP_REQ_POLICY, "=callback")}, {("XNOOP", "250"): (SMTP_RSP_REJECT, "550", "no")}, callback=callback
    )
    with mail(policy) as play:
        play.greet()
        play("""
            C> NOOP
            S< XNOOP
            S> 250 ok
            C< 550 no
        """)


def test_line_that_a_callback_makes_too_long_is_refused(mail):
    def callback(self, cmd, param):
        self.request_param = "x" * 600
        return SMTP_REQ_ACCEPT

    with mail(with_tables({"XTEST": (SMTP_REQ_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play("""
            C> XTEST
            C< 500 Invalid command
        """)
        play.goes_on()


def test_star_entry_decides_what_has_none(mail):
    with mail(with_tables({"*": (SMTP_REQ_REJECT, "550", "star")})) as play:
        play.greet()
        play("""
            C> FOO
            C< 550 star
            C> STAR
            C< 550 star
        """)
        play.goes_on()


def test_error_abort_closes_after_the_reply(mail):
    def callback(self, cmd, param):
        self.error_abort = 1
        return SMTP_REQ_REJECT

    with mail(with_tables({"NOOP": (SMTP_REQ_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play("""
            C> NOOP
            C< 500 Invalid command
            C|
            S|
        """)


@pytest.mark.parametrize(("permit", "passes"), [(0, False), (1, True)])
def test_permit_unknown_command(mail, permit, passes):
    def config(self):
        OpenSmtp.config(self)
        self.permit_unknown_command = permit

    with mail(type("Unknown", (OpenSmtp,), {"config": config})) as play:
        play.greet()
        play("C> XFOO bar")
        if passes:
            play("""
                S< XFOO bar
                S> 250 ok
                C< 500 Invalid command
            """)
        else:
            play("C< 500 Invalid command")
        play("""
            C> XCLIENT NAME=x
            C< 502 Command not implemented
        """)
        play.goes_on()


def test_dialogue_reply_to_an_unknown_verb_ends_the_session(mail):
    with mail(with_tables({"XFOO": SMTP_REQ_ACCEPT}, {("XFOO", "354"): SMTP_RSP_ACCEPT})) as play:
        play.greet()
        play(f"""
            C> XFOO
            S< XFOO
            S> 354 send me something
            C< {CLOSING}
            C|
            S|
        """)


# replies


@pytest.mark.parametrize(
    ("value", "reply"),
    [
        (SMTP_RSP_ACCEPT, "250 server"),
        ((SMTP_RSP_REJECT, "550", "policy"), "550 policy"),
        (SMTP_RSP_REJECT, "500 Invalid command"),
        ((SMTP_RSP_REJECT, "451"), "451 Invalid command"),
    ],
    ids=repr,
)
def test_reply_entry(mail, value, reply):
    with mail(with_tables(response={("NOOP", "250"): value})) as play:
        play.greet()
        play(f"""
            C> NOOP
            S< NOOP
            S> 250 server
            C< {reply}
            C> QUIT
            S< QUIT
        """)


@pytest.mark.parametrize(
    ("value", "text", "verdict"),
    [
        (SMTP_RSP_ABORT, "Response not allowed by policy; request='%s', response='%s'", "ABORTED_BY_POLICY_ACTION"),
        ("x", "Invalid response policy; request='%s', response='%s'", "INVALID_POLICY_CALL"),
        (2, "Invalid response policy; request='%s', response='%s'", "INVALID_POLICY_CALL"),
        ((SMTP_RSP_POLICY,), "Error in response policy; request='%s', response='%s'", "INVALID_POLICY_CALL"),
    ],
    ids=repr,
)
def test_reply_entry_that_ends_the_session(mail, value, text, verdict):
    with mail(with_tables(response={("NOOP", "250"): value})) as play:
        play.greet()
        play(f"""
            C> NOOP
            S< NOOP
            S> 250 server
            C< {CLOSING}
            C|
            S|
        """)
        assert play.log.has(text, ("NOOP", "250"))
    assert play.session.verdict == verdict


@pytest.mark.parametrize(
    ("verdict", "reply"),
    [
        (SMTP_RSP_ACCEPT, "251 changed"),
        (SMTP_RSP_REJECT, "550 by callback"),
        (4, CLOSING),
        (101, CLOSING),
        (2, CLOSING),
        (None, CLOSING),
    ],
    ids=repr,
)
def test_reply_callback(mail, verdict, reply):
    def callback(self, cmd, cmd_param, code, text):
        assert (cmd, cmd_param, code, text) == ("NOOP", "x", "250", "server")
        assert self.response_value == self.response_code == "250"
        self.response_value, self.response_param = "251", "changed"
        self.error_code, self.error_info = "550", "by callback"
        return verdict

    with mail(with_tables(response={("NOOP", "250"): (SMTP_RSP_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play(f"""
            C> NOOP x
            S< NOOP x
            S> 250 server
            C< {reply}
        """)


@pytest.mark.parametrize(
    ("code", "text"), [("250", "a\r\n250 b"), ("25", "x"), ("999", "x"), ("354", "x"), ("abc", "x"), ("", "x")]
)
def test_reply_value_that_cannot_be_sent_ends_the_session(mail, code, text):
    def callback(self, *_arguments):
        self.response_code, self.response_param = code, text
        return SMTP_RSP_ACCEPT

    with mail(with_tables(response={("NOOP", "250"): (SMTP_RSP_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play(f"""
            C> NOOP
            S< NOOP
            S> 250 server
            C< {CLOSING}
            C|
            S|
        """)
    assert play.session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_only_the_first_line_of_a_reply_is_rewritten(mail):
    def callback(self, *_arguments):
        self.response_param = "masked"
        return SMTP_RSP_ACCEPT

    with mail(with_tables(response={("EHLO", "250"): (SMTP_RSP_POLICY, "=callback")}, callback=callback)) as play:
        assert play.greet("SIZE 5", "8BITMIME") == ["250-masked", "250-SIZE 5", "250 8BITMIME"]


# a reply that the client does not get has happened at the server all the same


def test_refused_354_ends_the_session(mail):
    with mail(with_tables(response={("DATA", "354"): (SMTP_RSP_REJECT, "550", "no data")})) as play:
        play.greet()
        play.envelope()
        play("""
            C> DATA
            S< DATA
            S> 354 go
            C< 550 no data
            C|
            S|
        """)


@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
def test_refused_envelope_reply_resets_the_server(mail, verb):
    with mail(with_tables(response={(verb, "251"): (SMTP_RSP_REJECT, "550", "no")})) as play:
        play.greet()
        if verb == "RCPT":
            play.envelope()
        line = "MAIL FROM:<c@d>" if verb == "MAIL" else "RCPT TO:<c@d>"
        forwarded = "MAIL From:<c@d>" if verb == "MAIL" else "RCPT To:<c@d>"
        play(f"""
            C> {line}
            S< {forwarded}
            S> 251 accepted
            S< RSET
            S> 250 forgotten
            C< 550 no
            C> DATA
            C< 503 Invalid command in this state
        """)
        play.send_mail()


def test_reply_rewritten_to_a_refusal_resets_the_server(mail):
    def callback(self, *_arguments):
        self.response_code, self.response_param = "550", "not for you"
        return SMTP_RSP_ACCEPT

    with mail(with_tables(response={("RCPT", "251"): (SMTP_RSP_POLICY, "=callback")}, callback=callback)) as play:
        play.greet()
        play.envelope()
        play("""
            C> RCPT TO:<c@d>
            S< RCPT To:<c@d>
            S> 251 accepted
            S< RSET
            S> 250 forgotten
            C< 550 not for you
            C> DATA
            C< 503 Invalid command in this state
        """)


def test_server_that_does_not_agree_to_a_reset_is_left(mail):
    with mail(with_tables(response={("MAIL", "250"): SMTP_RSP_REJECT})) as play:
        play.greet()
        play(f"""
            C> MAIL FROM:<c@d>
            S< MAIL From:<c@d>
            S> 250 accepted
            S< RSET
            S> 500 what
            C< {CLOSING}
            C|
            S|
        """)
        assert play.log.find("Error sending RSET to the server;")


def test_refused_ehlo_reply_leaves_the_client_ungreeted(mail):
    with mail(with_tables(response={("EHLO", "251"): SMTP_RSP_REJECT})) as play:
        play.greet()
        play.envelope()
        play("""
            C> EHLO again
            S< EHLO again
            S> 251 hello
            C< 500 Invalid command
            C> RCPT TO:<a@b>
            C< 503 Invalid command in this state
            C> MAIL FROM:<a@b>
            C< 503 Invalid command in this state
        """)
        play.ehlo()
        play.send_mail()


def test_refused_rset_reply_has_reset_all_the_same(mail):
    with mail(with_tables(response={("RSET", "251"): SMTP_RSP_REJECT})) as play:
        play.greet()
        play.envelope()
        play("""
            C> RSET
            S< RSET
            S> 251 forgotten
            C< 500 Invalid command
            C> DATA
            C< 503 Invalid command in this state
        """)
        play.send_mail()


@pytest.mark.parametrize("server_says", ["221 bye", "250 bye", "500 stay", "299 odd"])
def test_any_reply_to_quit_ends_the_session(mail, server_says):
    with mail(with_tables(response={("QUIT", "221"): SMTP_RSP_REJECT})) as play:
        play.greet()
        play(f"""
            C> QUIT
            S< QUIT
            S> {server_says}
        """)
        assert play.client.rest().count(b"\r\n") == 1
        play("S|")


def test_helo_with_several_lines_is_refused(mail):
    with mail() as play:
        play("""
            S> 220 mx
            C< 220 mx
            C> HELO a
            S< HELO a
            S> 250-mx
            S> 250 SIZE
            C< 500 Invalid command
            C> MAIL FROM:<a@b>
            C< 503 Invalid command in this state
        """)


# greeting


def test_empty_tables_refuse_the_greeting(mail):
    class Empty(AbstractSmtpProxy):
        pass

    with mail(Empty) as play:
        play("""
            S> 220 mx
            C< 500 Invalid command
            C> EHLO a
            C< 500 Invalid command
        """)


@pytest.mark.parametrize(
    ("banner", "shown"), [("554 not here", "554 not here"), ("521 go away", "521 go away"), ("450 later", "450 later")]
)
def test_after_a_refusing_greeting_only_quit_is_useful(mail, banner, shown):
    with mail() as play:
        play(f"""
            S> {banner}
            C< {shown}
            C> EHLO a
            C< 503 Invalid command in this state
        """)
        play.client.send(b"BDAT 6\r\nQUIT\r\n")
        play("C< 503 Invalid command in this state")
        play.quit()


def test_server_that_leaves_after_its_refusal_takes_the_session_with_it(mail):
    with mail() as play:
        play("""
            S> 554 not here
            C< 554 not here
        """)
        play.session.server.close()
        play.wait_until_the_server_is_heard()
        play(f"""
            C> EHLO a
            C< {CLOSING}
            C|
        """)


def test_odd_greeting_ends_the_session(mail):
    with mail() as play:
        play(f"""
            S> 354 what
            C< {CLOSING}
            C|
            S|
        """)


# extensions


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (SMTP_EXT_ACCEPT, True),
        ((SMTP_EXT_ACCEPT,), True),
        (SMTP_EXT_DROP, False),
        ((SMTP_EXT_DROP, "x"), False),
        ("x", False),
        ((), False),
        (None, False),
        (SMTP_REQ_POLICY, False),
    ],
    ids=repr,
)
def test_extension_entry(mail, value, shown):
    with mail(with_tables(extensions={"SIZE": value})) as play:
        assert play.greet("SIZE 5") == (["250-mx.example", "250 SIZE 5"] if shown else ["250 mx.example"])


def test_star_means_the_extensions_that_are_understood(mail):
    with mail(with_tables(extensions={"*": SMTP_EXT_ACCEPT, "DSN": SMTP_EXT_DROP, "X-SITE": SMTP_EXT_ACCEPT})) as play:
        assert play.greet(
            "DSN", "ENHANCEDSTATUSCODES", "X-FOO", "XCLIENT NAME", "X-SITE a", "BURL imap", "STARTTLS", "REQUIRETLS"
        ) == ["250-mx.example", "250-ENHANCEDSTATUSCODES", "250 X-SITE a"]


def test_permit_extensions_is_looked_at_first(mail):
    def config(self):
        OpenSmtp.config(self)
        self.permit_extensions = 0x0400 | 0x0002
        self.extensions["SIZE"] = SMTP_EXT_DROP

    with mail(type("Masked", (OpenSmtp,), {"config": config})) as play:
        assert play.greet("DSN", "SIZE 5", "X") == ["250-mx.example", "250-DSN", "250 SIZE 5"]


def test_an_extension_goes_with_the_one_it_needs(mail):
    with mail(with_tables(extensions={"*": SMTP_EXT_ACCEPT})) as play:
        assert play.greet("BINARYMIME", "SMTPUTF8") == ["250 mx.example"]


def test_refused_ehlo_keeps_its_lines_and_clears_the_extensions(mail):
    with mail() as play:
        play.greet("8BITMIME")
        play("""
            C> EHLO again
            S< EHLO again
            S> 550-not
            S> 550 again
            C< 550-not
            C< 550 again
            C> MAIL FROM:<a@b> BODY=8BITMIME
            C< 500 Invalid command
        """)


def test_tables_of_two_sessions_are_their_own(mail):
    class Learning(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request["XLEARN"] = (SMTP_REQ_POLICY, self.learn)

        def learn(self, cmd, param):
            self.request["XLEARN"] = (SMTP_REQ_REJECT, "550", "once only")
            return SMTP_REQ_ACCEPT

    for _ in range(2):
        with mail(Learning) as play:
            play.greet()
            play("""
                C> XLEARN
                S< XLEARN
                S> 500 ok
                C< 500 ok
                C> XLEARN
                C< 550 once only
            """)
