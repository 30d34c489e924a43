"""What can be observed of the SMTP proxy from outside, without TLS and stacking."""

from __future__ import annotations

import resource
import threading
import types

import pytest

from test.smtp.play import CLOSING, EXTENSIONS, OpenSmtp, open_smtp
from Zorp.Matcher import RegexpMatcher
from Zorp.Smtp import (
    SMTP_REQ_ACCEPT,
    SMTP_REQ_POLICY,
    SMTP_REQ_REJECT,
    SMTP_RSP_ABORT,
    SMTP_RSP_ACCEPT,
    SMTP_RSP_POLICY,
    SmtpProxy,
)


def test_01_ehlo_shows_only_what_the_policy_permits(mail):
    with mail() as play:
        assert play.greet(*EXTENSIONS) == [
            "250-mx.example",
            "250-PIPELINING",
            "250-SIZE 10240000",
            "250-ETRN",
            "250-8BITMIME",
            "250 AUTH PLAIN LOGIN",
        ]


def test_02_a_mail_is_stored_byte_for_byte_and_accounted(mail):
    with mail() as play:
        play.greet(*EXTENSIONS)
        play.envelope("b@y.example", "c@y.example")
        play.data()
        play.body(b"Subject: \xe9\r\n\r\n..dots\r\nno line end follows\r\n.\r\n")
        play.stored()
        play.quit()
        assert play.log.has(
            "Accounting; sender='%s', recipient='%s', response='%s', response_param='%s', result='%s'",
            ("a@x.example", "b@y.example c@y.example", "250", "stored", "success"),
        )
    assert play.session.verdict == "ACCEPTED"


def test_03_server_down(mail):
    with mail(connected=False) as play:
        play("""
            C< 451 Server not available
            C> EHLO a
            C< 503 Server not available
            C> MAIL FROM:<a@b>
            C< 503 Invalid command in this state
            C> QUIT
            C< 221 Bye
            C|
        """)
    assert play.session.verdict == "DENIED_BY_CONNECTION_FAIL"


def test_04_server_down_with_another_code(mail):
    with mail(open_smtp(unconnected_response_code=421), connected=False) as play:
        play("C< 421 Server not available")


def test_05_plain_smtpproxy_relays_for_nobody(mail):
    with mail(SmtpProxy) as play:
        play.greet()
        play("""
            C> MAIL FROM:<a@x.example>
            S< MAIL From:<a@x.example>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<b@y.example>
            C< 554 Relaying denied.
        """)
        play.goes_on()
    texts = play.log.texts("smtp.policy")
    assert texts == [
        "Relaying denied; email='b@y.example'",
        "Request not allowed by policy; request='RCPT', verdict='3'",
    ]
    # and an auditor finds who tried, what became of it, and the failure in the accounts
    refused, = play.log.texts("smtp.info")[-1:]
    assert refused.startswith("Mail refused; client_address='AF_INET(127.0.0.1:")
    assert refused.endswith(
        "sender='a@x.example', recipient='b@y.example', response='554', response_param='Relaying denied.'")
    assert play.log.texts("smtp.accounting") == [
        "Accounting; sender='a@x.example', recipient='b@y.example', response='554', response_param='Relaying denied.', "
        "result='failure'"]


REFUSED = {
    "by the server": (["S< RCPT To:<b@y.example>", "S> 550 no such user", "C< 550 no such user"],
                      "b@y.example", "550", "no such user"),
    "for its form": (["C< 500 Invalid command"], "TO:<b@y.example", "500", "Invalid command"),
}


@pytest.mark.parametrize(("lines", "recipient", "code", "text"), REFUSED.values(), ids=REFUSED)
def test_every_refused_recipient_is_accounted(mail, lines, recipient, code, text):
    argument = recipient if recipient.startswith("TO:") else f"TO:<{recipient}>"
    with mail(open_smtp()) as play:
        play.greet()
        play("\n".join(["C> MAIL FROM:<a@x.example>", "S< MAIL From:<a@x.example>", "S> 250 ok", "C< 250 ok",
                        f"C> RCPT {argument}", *lines]))
        play.goes_on()
    accounted, = play.log.texts("smtp.accounting")
    assert f"recipient='{recipient}', response='{code}', response_param='{text}', result='failure'" in accounted


def test_a_blank_inside_a_recipient_does_not_separate_two(mail):
    with mail(open_smtp()) as play:
        play.greet()
        play("""
            C> MAIL FROM:<a@x.example>
            S< MAIL From:<a@x.example>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<"b c"@y.example>
            S< RCPT To:<"b c"@y.example>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<d@y.example>
            S< RCPT To:<d@y.example>
            S> 250 ok
            C< 250 ok
            C> DATA
            S< DATA
            S> 354 go
            C< 354 go
            C> body
            C> .
            S< body
            S< .
            S> 250 stored
            C< 250 stored
        """)
        line = play.log.wait_for("Accounting;").text
        size = play.log.wait_for("End of message;").text
    assert "recipient='\"b<20>c\"@y.example d@y.example'" in line
    assert size.endswith("recipients='2', size='6'")


@pytest.mark.parametrize(
    ("recipient", "accepted"),
    [
        ("a@x.example.com", True),
        ("a@EXAMPLE.org", True),
        ("a@example.com", False),
        ("a@notexample.org", False),
        ("a@example.org.", True),
        ("a@a.example.com.example.com", True),
    ],
)
def test_06_relay_domains(mail, recipient, accepted):
    with mail(open_smtp(relay_zones=(), relay_domains=(".example.com", "example.org", ""))) as play:
        play.greet()
        play.envelope("postmaster@example.org")
        play(f"C> RCPT TO:<{recipient}>")
        if accepted:
            play(f"""
                S< RCPT To:<{recipient.removesuffix(".")}>
                S> 250 ok
                C< 250 ok
            """)
        else:
            play("C< 554 Relaying denied.")


def zone(name, parent=None):
    return types.SimpleNamespace(getName=lambda: name, name=name, admin_parent=parent)


@pytest.mark.parametrize(
    ("zones", "accepted"),
    [("office", True), (("dmz", "office"), True), (("lab",), True), (("dmz",), False), (5, False)],
)
def test_07_relay_zones_cover_the_zones_below(mail, zones, accepted):
    with mail(open_smtp(relay_zones=zones), start=False) as play:
        play.session.master.client_zone = zone("lab", zone("office"))
        play.session.start()
        play.greet()
        play("""
            C> MAIL FROM:<a@b>
            S< MAIL From:<a@b>
            S> 250 ok
            C< 250 ok
            C> RCPT TO:<b@y.example>
        """)
        play("S< RCPT To:<b@y.example>" if accepted else "C< 554 Relaying denied.")


@pytest.mark.parametrize("address", ["a%b@ok.example", "b!a@ok.example"])
def test_08_percent_and_exclamation_mark(mail, address):
    with mail() as play:
        play.greet()
        play.envelope()
        play(f"""
            C> RCPT TO:<{address}>
            C< 501 Malformed address
        """)
    with mail(open_smtp(permit_percent_hack=1, permit_exclamation_mark=1)) as play:
        play.greet()
        play.envelope(address)


@pytest.mark.parametrize("address", [
    '"b@evil"@ok.example', r'"b\\@evil"@ok.example', r'"b\\"@evil"@ok.example', '"@evil:b"@ok.example',
    '"@evil,@c:b"@ok.example', '"@"@ok.example',
])
@pytest.mark.parametrize("settings", [
    {"relay_zones": (), "relay_domains": ("ok.example",)}, {"relay_zones": "*"}, {"relay_check": 0},
    {"address_syntax": "compat"}, {"permit_percent_hack": 1, "permit_exclamation_mark": 1},
], ids=lambda settings: "+".join(settings))
def test_08_a_quoted_at_sign_is_a_route_to_another_domain(mail, address, settings):
    with mail(open_smtp(**settings)) as play:
        play.greet()
        play.envelope("a@ok.example")
        play(f"""
            C> RCPT TO:<{address}>
            C< 501 Malformed address
        """)
        play.goes_on()
    with mail(open_smtp(permit_quoted_at=1, **settings)) as play:
        play.greet()
        play.envelope(address)


def test_08_a_bare_quoted_at_sign_gets_no_further_with_a_domain_of_ours(mail):
    with mail(open_smtp(append_domain="ok.example")) as play:
        play.greet()
        play.envelope("a@ok.example")
        play("""
            C> RCPT TO:<"b@evil">
            C< 501 Malformed address
        """)


def test_08_an_address_without_quoted_at_sign_passes_and_any_sender_does(mail):
    with mail(open_smtp(relay_zones=(), relay_domains=("ok.example",))) as play:
        play.greet()
        for sender in ("", '"a@evil"@x.example'):
            play(f"""
                C> MAIL FROM:<{sender}>
                S< MAIL From:<{sender}>
                S> 250 ok
                C< 250 ok
            """)
            for recipient in ("b@ok.example", '"b c"@ok.example', r'"b\\"c"@ok.example', '"b,c:d"@ok.example',
                              "postmaster"):
                play(f"""
                    C> RCPT TO:<{recipient}>
                    S< RCPT To:<{recipient}>
                    S> 250 ok
                    C< 250 ok
                """)
            play("""
                C> RSET
                S< RSET
                S> 250 ok
                C< 250 ok
            """)


@pytest.mark.parametrize(
    ("soft", "reply"),
    [(0, "550 Sender address refused."), (1, "450 Cannot verify sender at this time, come back later.")],
)
def test_09_sender_matcher(mail, soft, reply):
    with mail(open_smtp(sender_matcher=RegexpMatcher(("^bad@",)), error_soft=soft)) as play:
        play.greet()
        play(f"""
            C> MAIL FROM:<bad@x>
            C< {reply}
        """)
        play.envelope()


def test_10_mail_is_rewritten(mail):
    with mail() as play:
        play.greet("SIZE")
        play("""
            C> MAIL FROM:   <@h1,@h2:a@b> size=00100
            S< MAIL From:<a@b> SIZE=100
        """)


def test_11_brackets_may_be_left_out_where_permitted(mail):
    with mail() as play:
        play.greet()
        play("""
            C> mail from:a@b
            C< 500 Invalid command
        """)
    with mail(open_smtp(permit_omission_of_angle_brackets=1)) as play:
        play.greet()
        play("""
            C> mail from:a@b
            S< MAIL From:<a@b>
        """)


def test_12_append_domain(mail):
    with mail(open_smtp(append_domain="ex.org")) as play:
        play.greet()
        play.envelope()
        play("""
            C> RCPT TO:<joe>
            S< RCPT To:<joe@ex.org>
        """)


def test_13_wrong_order(mail):
    with mail() as play:
        play("""
            S> 220 mx
            C< 220 mx
            C> MAIL FROM:<a@b>
            C< 503 Invalid command in this state
        """)
        play.ehlo()
        play("""
            C> DATA
            C< 503 Invalid command in this state
            C> RCPT TO:<a@b>
            C< 503 Invalid command in this state
        """)
        play.goes_on()
        assert play.log.has("Command not permitted in this state; request='%s', state='%d'", ("MAIL", 1))
        assert play.log.has("Command not permitted in this state; request='%s', state='%d'", ("DATA", 2))


def test_14_ehlo_inside_a_transaction_begins_anew(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play.ehlo()
        play("""
            C> RCPT TO:<c@y.example>
            C< 503 Invalid command in this state
        """)
        play.send_mail()


def test_15_helo_has_no_extensions(mail):
    with mail() as play:
        play.greet(verb="HELO")
        play("""
            C> MAIL FROM:<a@b> SIZE=5
            C< 500 Invalid command
            C> AUTH LOGIN
            C< 500 Invalid command
        """)
        play.send_mail()


def test_16_vrfy(mail):
    class Vrfy(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request["VRFY"] = (SMTP_REQ_REJECT, "252", "Cannot VRFY user")

    for proxy_class, reply in ((OpenSmtp, "500 Invalid command"), (Vrfy, "252 Cannot VRFY user")):
        with mail(proxy_class) as play:
            play.greet()
            play(f"""
                C> VRFY joe
                C< {reply}
            """)
            play.goes_on()


def test_17_request_callback_masks_the_client(mail):
    class Masked(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.request["EHLO"] = (SMTP_REQ_POLICY, self.mask)

        def mask(self, cmd, param):
            assert (cmd, param) == ("EHLO", "client.example")
            self.request_param = "mask.example"
            return SMTP_REQ_ACCEPT

    with mail(Masked) as play:
        play("""
            S> 220 mx
            C< 220 mx
            C> EHLO client.example
            S< EHLO mask.example
        """)


def test_18_reply_callback_masks_the_banner(mail):
    class Masked(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.response["Null", "220"] = (SMTP_RSP_POLICY, self.mask)

        def mask(self, cmd, cmd_param, code, text):
            assert (cmd, cmd_param, code, text) == ("Null", "", "220", "mx.example Postfix 3.7")
            self.response_param = "mail ready"
            return SMTP_RSP_ACCEPT

    with mail(Masked) as play:
        play("""
            S> 220 mx.example Postfix 3.7
            C< 220 mail ready
        """)


def test_19_reply_entries_by_prefix(mail):
    class Prefix(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            self.response["*", "55"] = SMTP_RSP_ABORT

    with mail(Prefix) as play:
        play.greet()
        play.envelope()
        play("""
            C> RCPT TO:<c@y.example>
            S< RCPT To:<c@y.example>
            S> 551 not here
            C< 551 not here
            C> RCPT TO:<c@y.example>
            S< RCPT To:<c@y.example>
            S> 559 odd
        """)
        play(f"""
            C< {CLOSING}
            C|
        """)
    assert play.session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_20_unlisted_reply_keeps_its_class(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play("""
            C> RCPT TO:<c@y.example>
            S< RCPT To:<c@y.example>
            S> 459 odd
            C< 451 Requested action aborted
            C> RCPT TO:<c@y.example>
            S< RCPT To:<c@y.example>
            S> 559 odd
            C< 550 Requested action not taken
        """)
        play.data()


def test_21_data_refused_by_the_server_gets_one_reply(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play.data_refused("554 no")
        play.goes_on()
        play.send_mail()
        assert play.log.has(
            "Accounting; sender='%s', recipient='%s', response='%s', response_param='%s', result='%s'",
            ("a@x.example", "b@y.example", "554", "no", "failure"),
        )


def test_23_a_large_body_with_long_lines_arrives_identical(mail):
    line = bytes(range(128, 256)) * 468 + b"\xff" * 96 + b"\r\n"  # 60 002 bytes
    count = 850  # 51 MB
    with mail() as play:
        play.greet("8BITMIME")
        play.envelope()
        play.data()
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sender = threading.Thread(target=lambda: [play.client.send(line) for _ in range(count)])
        sender.start()
        for _ in range(count - 1):
            assert play.server.bytes(len(line)) == line
        sender.join()
        play.body(b".\r\n", line + b".\r\n")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 8 * 1024
        play.stored()
        play.quit()


def test_24_received_header(mail):
    with mail(open_smtp(add_received_header=1, domain_name="fw.example")) as play:
        play.greet()
        play.envelope()
        play.data()
        play.client.send(b"Subject: t\r\n\r\n.\r\n")
        first = play.server.line()
        assert first.startswith(b"Received: from client.example ([127.0.0.1])")
        more = play.server.line()
        while more[:1] in b" \t":
            first, more = first.rstrip(b"\r\n") + b" " + more.strip() + b"\r\n", play.server.line()
        assert b"by fw.example with ESMTP id svc/" in first
        assert more == b"Subject: t\r\n"
        assert play.server.bytes(5) == b"\r\n.\r\n"


def test_34_long_lines(mail):
    with mail() as play:
        play.greet()
        play.client.send(b"A" * 600 + b"\r\n")
        play("C< 500 Invalid command")
        play.goes_on()
        play.client.send(b"A" * 5000)
        play(f"""
            C< {CLOSING}
        """)
        assert play.server.rest() == b""


@pytest.mark.parametrize(
    "line", [b"NOOP \x00", b"NOOP a\rb", b"NOOP \x80", b"NOOP\tx"], ids=["NUL", "CR", "8-bit", "TAB"]
)
def test_35_bytes_with_two_meanings(mail, line):
    with mail() as play:
        play.greet()
        play.client.send(line + b"\r\n")
        play("C< 500 Invalid command")
        play.goes_on()


def test_36_pipelined_commands_are_answered_in_order(mail):
    recipients = [f"r{n}@y.example" for n in range(30)]
    with mail() as play:
        play.greet("PIPELINING")
        play.client.send(
            b"MAIL FROM:<a@x.example>\r\n"
            + b"".join(b"RCPT TO:<%b>\r\n" % r.encode() for r in recipients)
            + b"DATA\r\n"
        )
        play("""
            S< MAIL From:<a@x.example>
            S> 250 sender
        """)
        for recipient in recipients:
            play(f"""
                S< RCPT To:<{recipient}>
                S> 250 {recipient}
            """)
        play("""
            S< DATA
            S> 354 go
            C< 250 sender
        """)
        for recipient in recipients:
            play(f"C< 250 {recipient}")
        play("C< 354 go")
        play.client.send(b"one\r\n.\r\nQUIT\r\n")
        play("""
            S< one
            S< .
            S> 250 stored
            S< QUIT
            S> 221 bye
            C< 250 stored
            C< 221 bye
            C|
        """)


@pytest.mark.parametrize("who", ["client", "server"])
def test_37_silence_ends_the_session(mail, who):
    with mail(open_smtp(timeout=300)) as play:
        play.greet()
        if who == "server":
            play("""
                C> NOOP
                S< NOOP
            """)
        play(f"""
            C< {CLOSING}
            C|
            S|
        """)


def test_38_client_leaves_in_the_middle_of_a_body(mail):
    with mail() as play:
        play.greet()
        play.envelope()
        play.data()
        play.client.send(b"Subject: t\r\n\r\nhalf a mes")
        play.session.client.close()
        assert b"\r\n.\r\n" not in play.server.rest()
        play.session.wait_for_end()
    assert play.log.wait_for("Accounting; ").arguments[-1] == "failure"


def test_39_smtputf8(mail):
    with mail(open_smtp(permit=("SMTPUTF8",))) as play:
        assert "250 SMTPUTF8" in play.greet("8BITMIME", "SMTPUTF8")
        play("""
            C> MAIL FROM:<\\xc3\\xa9@b> SMTPUTF8
            S< MAIL From:<\\xc3\\xa9@b> SMTPUTF8
            S> 250 \\xc3\\xa9 ok
            C< 250 \\xc3\\xa9 ok
            C> RCPT TO:<\\xc3\\xa9@b>
            S< RCPT To:<\\xc3\\xa9@b>
        """)
    with mail() as play:
        assert "250 8BITMIME" in play.greet("8BITMIME", "SMTPUTF8")
        play("""
            C> MAIL FROM:<\\xc3\\xa9@b> SMTPUTF8
            C< 500 Invalid command
            C> MAIL FROM:<a@b> SMTPUTF8
            C< 500 Invalid command
        """)
        play.goes_on()


def test_40_chunks(mail):
    octets = b"one\r\n.\r\nMAIL FROM:<evil@x>\r\n\x80\n.\n"
    with mail(open_smtp(permit=("CHUNKING",))) as play:
        play.begin_chunks()
        play.client.send(b"BDAT %d\r\n" % len(octets) + octets)
        play(f"S< BDAT {len(octets)}")
        assert play.server.bytes(len(octets)) == octets
        play("""
            S> 250 chunk
            C< 250 chunk
            C> BDAT 0 LAST
            S< BDAT 0 LAST
            S> 250 stored
            C< 250 stored
        """)
        play.send_mail()
        assert play.log.wait_for("Accounting; ").arguments[-1] == "success"
