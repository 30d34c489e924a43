"""Attribute by attribute: defaults, when they may be set, and what each one does."""

from __future__ import annotations

import pytest

from test.smtp.play import CLOSING, OpenSmtp, open_smtp
from test.smtp.test_tables import with_tables
from Zorp import Globals
from Zorp.Exceptions import MatcherException
from Zorp.Matcher import MatcherPolicy, RegexpMatcher
from Zorp.Smtp import SMTP_REQ_POLICY, SMTP_REQ_REJECT, SMTP_STK_NONE, SmtpProxy

CONFIG_DEFAULTS = {
    "timeout": 600_000,
    "interval_transfer_noop": 60_000,
    "max_request_length": 512,
    "max_auth_request_length": 12288,
    "max_response_length": 512,
    "max_line_length": 4096,
    "require_crlf": 1,
    "unconnected_response_code": 451,
    "permit_unknown_command": 0,
    "permit_long_responses": 0,
    "permit_omission_of_angle_brackets": 0,
    "append_domain": "",
    "permit_extensions": 0,
    "add_received_header": 0,
    "tls_passthrough": 0,
    "helo_string": "",
    "protocol": "",
    "relay_check": 1,
    "relay_zones": (),
    "relay_domains": (),
    "relay_domains_matcher": None,
    "sender_matcher": None,
    "recipient_matcher": None,
    "permit_percent_hack": 0,
    "permit_exclamation_mark": 0,
    "permit_quoted_at": 0,
    "error_soft": 0,
    "request_stack": {},
    "address_syntax": "strict",
    "max_errors": 20,
}


def values_at(moment, names, mail):
    """Return the attributes as policy code reads them in config() or in a request callback."""
    seen = {}

    class Reading(OpenSmtp):
        def config(self):
            SmtpProxy.config(self)
            self.request["XREAD"] = (SMTP_REQ_POLICY, self.read)
            if moment == "config":
                self.read("", "")
                del self.request["XREAD"]

        def read(self, cmd, param):
            seen.update({name: getattr(self, name) for name in names})
            return SMTP_REQ_REJECT

    with mail(Reading) as play:
        play.greet("8BITMIME", "SIZE 5")
        play("""
            C> XREAD it
            C< 500 Invalid command
        """)
    return seen


def test_defaults_in_config(mail):
    assert values_at("config", CONFIG_DEFAULTS, mail) == CONFIG_DEFAULTS


def test_values_in_a_callback(mail):
    wanted = {
        "helo_string": "client.example",
        "protocol": "ESMTP",
        "active_extensions": 0x000A,
        "request_cmd": "XREAD",
        "request_param": "it",
        "response_code": "250",
        "response_param": "mx.example",
        "error_code": "500",
        "error_info": "Invalid command",
        "error_abort": 0,
        "sender": "",
        "recipients": "",
        "timeout": 600_000,
    }
    assert values_at("run", wanted, mail) == wanted


def test_attributes_that_cannot_be_set_in_a_callback_keep_their_value(mail):
    class Late(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request["XSET"] = (SMTP_REQ_POLICY, self.set)

        def set(self, cmd, param):
            self.max_request_length = 5
            self.unconnected_response_code = 421
            self.append_domain = "late.example"
            return SMTP_REQ_REJECT

    with mail(Late) as play:
        play.greet()
        play("""
            C> XSET
            C< 500 Invalid command
            C> MAIL FROM:<joe>
            S< MAIL From:<joe@late.example>
        """)
        assert play.log.has("Attribute cannot be written; config='%d', name='%s'", (0, "max_request_length"))


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("<a@b>", "a@b"),
        ("  <@h:a@b> SIZE=5", "a@b"),
        ("<>", ""),
        ("<postmaster>", "postmaster"),
        ("<a@b.>", "a@b"),
        ("a@b", "Invalid address"),
        ("<a", "Invalid address"),
        ("<.@b>", "Invalid address"),
        (5, "Invalid arguments"),
    ],
)
def test_sanitize_address(mail, path, address):
    seen = []

    class Asking(OpenSmtp):
        def checkSender(self, cmd, param):
            try:
                seen.append(self.sanitizeAddress(path))
            except ValueError as problem:
                seen.append(str(problem))
            with pytest.raises(ValueError, match="Invalid arguments"):
                self.sanitizeAddress()
            return SMTP_REQ_REJECT

    with mail(Asking) as play:
        play.greet()
        play("""
            C> MAIL FROM:<a@b>
            C< 500 Invalid command
        """)
    assert seen == [address]


@pytest.mark.parametrize(
    ("settings", "line", "forwarded"),
    [
        ({"max_request_length": 20}, "NOOP " + "x" * 15, True),
        ({"max_request_length": 20}, "NOOP " + "x" * 16, False),
        ({"max_request_length": 1000}, "NOOP " + "x" * 900, True),
    ],
)
def test_max_request_length(mail, settings, line, forwarded):
    with mail(open_smtp(**settings)) as play:
        play("""
            S> 220 mx
            C< 220 mx
            C> EHLO a
            S< EHLO a
            S> 250 mx
            C< 250 mx
        """)
        play(f"""
            C> {line}
            {f"S< {line}" if forwarded else "C< 500 Invalid command"}
        """)


def test_extensions_in_force_make_mail_and_rcpt_longer(mail):
    local = "l" * 60
    with mail(open_smtp(permit=("DSN",))) as play:
        play.greet("SIZE", "AUTH PLAIN", "DSN")
        envelope_id, auth = "e" * 100, "a" * 480
        play(f"""
            C> MAIL FROM:<{local}@x> SIZE=5 RET=FULL ENVID={envelope_id} AUTH={auth}
            S< MAIL From:<{local}@x> SIZE=5 RET=FULL ENVID={envelope_id} AUTH={auth}
        """)
    with mail() as play:
        play.greet()
        play.client.send(f"MAIL FROM:<{local}@x>{' ' * 500}\r\n".encode())
        play("C< 500 Invalid command")


@pytest.mark.parametrize(("permit", "reply"), [(0, CLOSING), (1, "250 " + "x" * 508)])
def test_permit_long_responses(mail, permit, reply):
    with mail(open_smtp(permit_long_responses=permit)) as play:
        play.greet()
        play(f"""
            C> NOOP
            S< NOOP
            S> 250 {"x" * 600}
            C< {reply}
        """)
        if permit:
            assert play.log.has(
                "Response line was too long, truncated; length='%d', max_response_length='%d'", (512, 512)
            )
        else:
            assert play.log.find("Response line too long; line='250 xxx")


def test_max_response_length(mail):
    with mail(open_smtp(max_response_length=1000)) as play:
        play.greet()
        play(f"""
            C> NOOP
            S< NOOP
            S> 250 {"x" * 900}
            C< 250 {"x" * 900}
        """)


def test_max_line_length(mail):
    with mail(open_smtp(max_line_length=100)) as play:
        play.greet()
        play(f"""
            C> NOOP {"x" * 93}
            S< NOOP {"x" * 93}
            S> 250 ok
            C< 250 ok
            C> NOOP {"x" * 94}
            C< {CLOSING}
            C|
        """)


def test_lone_lf_is_accepted_where_crlf_is_not_required(mail):
    with mail(open_smtp(require_crlf=0)) as play:
        play.client.send(b"EHLO a\n")
        play.server.send(b"220 mx\n")
        play("""
            C< 220 mx
            S< EHLO a
        """)


def test_compat_addresses(mail):
    for syntax, forwarded in (("strict", False), ("compat", True)):
        with mail(open_smtp(address_syntax=syntax)) as play:
            play.greet()
            play("C> MAIL FROM:<a..b@#12>")
            play("S< MAIL From:<a..b@#12>" if forwarded else "C< 500 Invalid command")


def test_postmaster_needs_no_domain(mail):
    with mail(SmtpProxy) as play:
        play.greet()
        play("""
            C> MAIL FROM:<>
            S< MAIL From:<>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<PostMaster>
            S< RCPT To:<PostMaster>
        """)


@pytest.mark.parametrize(
    ("argument", "reply"),
    [
        ("", "500 Invalid command"),
        ("a b", "500 Invalid command"),
        ("a ", "500 Invalid command"),
        ("<a>", "500 Invalid command"),
        ("[1.2.3.4]", None),
        ("[IPv6:::1]", None),
        ("WIN_PC", None),
    ],
)
def test_helo_arguments(mail, argument, reply):
    with mail() as play:
        play("""
            S> 220 mx
            C< 220 mx
        """)
        play.client.send(f"EHLO {argument}\r\n".encode())
        play(f"C< {reply}" if reply else f"S< EHLO {argument}")


@pytest.mark.parametrize(
    ("argument", "passes"), [("example.org", True), ("@example.org", True), ("#q", True), ("", False), ("a b", False)]
)
def test_etrn(mail, argument, passes):
    with mail() as play:
        play.greet("ETRN")
        play(f"C> ETRN {argument}")
        play(f"S< ETRN {argument}" if passes else "C< 500 Invalid command")


def test_etrn_needs_its_extension(mail):
    with mail() as play:
        play.greet()
        play("""
            C> ETRN example.org
            C< 500 Invalid command
        """)


@pytest.mark.parametrize("line", ["RSET x", "QUIT now"])
def test_arguments_where_there_are_none(mail, line):
    with mail() as play:
        play.greet()
        play(f"""
            C> {line}
            C< 500 Invalid command
        """)
        play.goes_on()


def test_starttls(mail):
    with mail() as play:
        play.greet("STARTTLS")
        play("""
            C> STARTTLS now
            C< 501 Syntax error (no parameters allowed)
            C> STARTTLS
            C< 454 TLS not available due to temporary reason
        """)
        play.goes_on()


# what cannot be used ends the session before it begins


@pytest.mark.parametrize(
    "settings",
    [
        {"tls_passthrough": 1},
        {"client_tls_required": 1},
        {"server_tls_required": 1},
        {"timeout": 0},
        {"max_line_length": -1},
        {"address_syntax": "odd"},
        {"auth_mechanisms": (5,)},
        {"timeout": "soon"},
        {"encryption_policy": "x"},
    ],
    ids=repr,
)
def test_setting_that_is_refused(mail, settings):
    with mail(open_smtp(**settings)) as play:
        play("C|")
        assert not play.session.server_was_contacted
    assert play.session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert [message for message in play.log.messages if message.tag == "core.policy" and message.level == 1]


@pytest.mark.parametrize("stack", [{}, {"*": (SMTP_STK_NONE,)}, {"DATA": (SMTP_STK_NONE, "x")}])
def test_no_stacking_is_fine(mail, stack):
    with mail(open_smtp(request_stack=stack)) as play:
        play.greet()
        play.send_mail()


# addresses


@pytest.mark.parametrize(
    ("soft", "reply"),
    [(0, "554 Recipient address refused."), (1, "450 Cannot verify recipient at this time, come back later.")],
)
def test_recipient_matcher(mail, soft, reply):
    with mail(open_smtp(recipient_matcher=RegexpMatcher(("^bad@",)), error_soft=soft)) as play:
        play.greet()
        play.envelope()
        play(f"""
            C> RCPT TO:<bad@x>
            C< {reply}
        """)
        play.goes_on()
        assert play.log.find("Recipient address administratively prohibited; email='bad@x'")


class Undecided(RegexpMatcher):
    def checkMatch(self, str):
        raise MatcherException("cannot say")


@pytest.mark.parametrize(
    ("name", "line", "reply"),
    [
        ("sender_matcher", "MAIL FROM:<a@b>", "450 Cannot verify sender at this time, come back later."),
        ("recipient_matcher", "RCPT TO:<a@b>", "450 Cannot verify recipient at this time, come back later."),
        ("relay_domains_matcher", "RCPT TO:<a@b>", "554 Relaying denied."),
    ],
)
def test_matcher_that_cannot_decide_refuses(mail, name, line, reply):
    with mail(
        open_smtp(**{name: Undecided()}, relay_zones=(), relay_domains=("b",) if name == "recipient_matcher" else ())
    ) as play:
        play.greet()
        if name != "sender_matcher":
            play("""
                C> MAIL FROM:<a@b>
                S< MAIL From:<a@b>
                S> 250 ok
                C< 250 ok
            """)
        play(f"""
            C> {line}
            C< {reply}
        """)
        play.goes_on()


def test_relay_domains_matcher_and_names_of_matchers(mail):
    MatcherPolicy("ours", RegexpMatcher(("^ours[.]example$",)))
    try:
        with mail(open_smtp(relay_zones=(), relay_domains_matcher="ours")) as play:
            play.greet()
            play.envelope("a@ours.example")
            play("""
                C> RCPT TO:<a@theirs.example>
                C< 554 Relaying denied.
            """)
    finally:
        del Globals.matchers["ours"]


def test_unknown_matcher_ends_the_session(mail):
    with mail(open_smtp(sender_matcher="nobody")) as play:
        play("C|")
        assert not play.session.server_was_contacted


@pytest.mark.parametrize(
    ("domains", "recipient", "accepted"),
    [
        ("bücher.example", "a@xn--bcher-kva.example", True),
        (("xn--bcher-kva.example",), "a@XN--BCHER-KVA.example", True),
        ("example.org", "a@sub.example.org", False),
        (".example.org", "a@example.org", False),
        (("",), "a@b", False),
        ("strasse.example", "a@xn--strae-oqa.example", False),
    ],
)
def test_relay_domains(mail, domains, recipient, accepted):
    with mail(open_smtp(relay_zones=(), relay_domains=domains)) as play:
        play.greet()
        play("""
            C> MAIL FROM:<a@b>
            S< MAIL From:<a@b>
            S> 250 ok
            C< 250 ok
        """)
        play(f"C> RCPT TO:<{recipient}>")
        play(f"S< RCPT To:<{recipient}>" if accepted else "C< 554 Relaying denied.")


def test_relay_domains_in_utf8(mail):
    with mail(open_smtp(permit=("SMTPUTF8",), relay_zones=(), relay_domains=("bücher.example",))) as play:
        play.greet("8BITMIME", "SMTPUTF8")
        play("""
            C> MAIL FROM:<a@b> SMTPUTF8
            S< MAIL From:<a@b> SMTPUTF8
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<a@b\\xc3\\xbccher.example>
            S< RCPT To:<a@b\\xc3\\xbccher.example>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<a@b\\xc3\\xbcch\\xc3\\xbc.example>
            C< 554 Relaying denied.
        """)


def test_relay_check_can_be_switched_off(mail):
    with mail(open_smtp(relay_zones=(), relay_check=0)) as play:
        play.greet()
        play.envelope()


def test_null_sender_is_checked_as_an_empty_text(mail):
    seen = []

    class Recording(RegexpMatcher):
        def checkMatch(self, str):
            seen.append(str)
            return 0

    with mail(open_smtp(sender_matcher=Recording())) as play:
        play.greet()
        play("""
            C> MAIL FROM:<>
            S< MAIL From:<>
        """)
    assert seen == [""]


# enhanced status codes


def test_status_codes_only_where_they_are_in_force(mail):
    with mail(with_tables({"XTEST": (SMTP_REQ_REJECT, "550", "5.1.1 mine")})) as play:
        play.greet("ENHANCEDSTATUSCODES")
        play("""
            C> FOO
            C< 500 5.5.2 Invalid command
            C> DATA
            C< 503 5.5.1 Invalid command in this state
            C> DATA x
            C< 503 5.5.1 Invalid command in this state
            C> XTEST
            C< 550 5.1.1 mine
        """)
        play.envelope()
        play("""
            C> DATA x
            C< 501 5.5.4 Invalid command
            C> RCPT TO:<a%b@c>
            C< 501 5.5.4 Malformed address
        """)
        play.data()
        play.client.send(b"a\nb\r\n.\r\n")
        play("C< 550 5.6.0 Mail body error (probably incorrect CRLF sequence)")


def test_relaying_denied_with_status_code(mail):
    with mail(SmtpProxy) as play:
        play.greet("ENHANCEDSTATUSCODES")
        play("""
            C> MAIL FROM:<a@b>
            S< MAIL From:<a@b>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<a@b>
            C< 554 5.7.1 Relaying denied.
        """)


# DSN and other parameters


def test_dsn_parameters_pass_when_permitted(mail):
    with mail(open_smtp(permit=("DSN",))) as play:
        play.greet("DSN")
        play("""
            C> MAIL FROM:<a@b> RET=HDRS ENVID=QQ314159
            S< MAIL From:<a@b> RET=HDRS ENVID=QQ314159
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<c@d> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;c@d
            S< RCPT To:<c@d> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;c@d
        """)
    with mail() as play:
        play.greet("DSN")
        play("""
            C> MAIL FROM:<a@b> RET=HDRS
            C< 555 Invalid command
        """)
        play.envelope()
        play("""
            C> RCPT TO:<c@d> NOTIFY=NEVER
            C< 555 Invalid command
        """)


def test_duplicate_parameters_are_refused(mail):
    with mail() as play:
        play.greet("SIZE")
        play("""
            C> MAIL FROM:<a@b> SIZE=1 SIZE=2
            C< 501 Invalid command
        """)
        assert play.log.find("Invalid SMTP command; request='MAIL', param='FROM:<a@b> SIZE=1 SIZE=2'")


def test_limits_are_lowered_in_the_ehlo_reply(mail):
    with mail(open_smtp(permit=("LIMITS",), max_recipients=10)) as play:
        assert play.greet("LIMITS RCPTMAX=100 MAILMAX=5") == ["250-mx.example", "250 LIMITS RCPTMAX=10 MAILMAX=5"]


# settings that cannot be meant

def test_what_cannot_be_meant_is_said_once_for_a_class(mail):
    class Wrong(SmtpProxy):
        def config(self):
            SmtpProxy.config(self)
            self.request["VRFY"] = 99
            self.relay_zones = ("nosuchzone",)
            self.relay_zone = ("office",)

    texts = []
    for _ in range(2):
        with mail(Wrong) as play:
            play.greet()
            play.goes_on()
        texts += play.log.texts("core.policy")
    # then each is one line, with its place, although the sessions are served
    assert [text.partition("; class=")[0] for text in texts] == [
        "Unknown attribute set, perhaps misspelt",
        "No such action; table='request', key='VRFY', error='unknown number 99'",
        "No such zone in relay_zones; zone='nosuchzone'",
    ]
    assert all(f"place='{__file__}:" in text for text in texts)
