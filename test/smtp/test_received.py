"""The Received line: its parts, its folding, and what happens when the policy's own is unusable."""

from __future__ import annotations

import time

import dns.resolver
import pytest

from test.smtp.play import OpenSmtp, open_smtp
from test.support.dns_server import SILENCE, DnsServer
from Zorp.Smtp import SMTP_GETDOMAIN_FQDN, SMTP_GETDOMAIN_MAILNAME
from Zorp.smtp_engine import received

NOON = 1_700_000_000.0


def message_start(mail, proxy_class, body=b"Subject: t\r\n\r\n.\r\n", extensions=(), verb="EHLO"):
    """Return what the server gets in front of the body, and the log."""
    with mail(proxy_class) as play:
        play.greet(*extensions, verb=verb)
        play.envelope()
        play.data()
        play.client.send(body)
        got = b""
        while not got.endswith(body):
            got += play.server.line()
        return got.removesuffix(body).decode("latin-1"), play.log


def unfolded(header):
    return header.replace("\r\n\t", " ").removesuffix("\r\n")


def test_parts(mail):
    header, log = message_start(mail, open_smtp(add_received_header=1, domain_name="fw.example"))
    words = unfolded(header).split()
    assert words[:9] == [
        "Received:",
        "from",
        "client.example",
        "([127.0.0.1])",
        "by",
        "fw.example",
        "with",
        "ESMTP",
        "id",
    ]
    assert words[9].startswith("svc/")
    assert ":" not in words[9].rstrip(";")
    assert not log.find("Couldn't generate")


def test_helo_says_smtp(mail):
    header, _ = message_start(mail, open_smtp(add_received_header=1), verb="HELO")
    assert "by unknown with SMTP id" in unfolded(header)


@pytest.mark.parametrize(
    ("source", "name"),
    [(SMTP_GETDOMAIN_MAILNAME, "mail.example"), (SMTP_GETDOMAIN_FQDN, "host.example"), ("other", "unknown")],
)
def test_own_name(mail, source, name, tmp_path, monkeypatch):
    (tmp_path / "mailname").write_text("mail.example\nsecond line\n")
    monkeypatch.setattr(received, "MAILNAME", tmp_path / "mailname")
    monkeypatch.setattr(received, "own_name", lambda: "host.example")
    header, _ = message_start(mail, open_smtp(add_received_header=1, autodetect_domain_from=source))
    assert f"by {name} with" in unfolded(header)


def test_missing_mailname_is_reported(mail, tmp_path, monkeypatch):
    monkeypatch.setattr(received, "MAILNAME", tmp_path / "nothing")
    header, log = message_start(mail, open_smtp(add_received_header=1, autodetect_domain_from=SMTP_GETDOMAIN_MAILNAME))
    assert "by unknown with" in unfolded(header)
    assert log.find("Error reading mailname; error='")


@pytest.mark.parametrize(
    "value",
    [None, 5, "Received: x", "x\n", "a\r\n\r\nb\r\n", ".\r\n", "a\r\n.\r\n", "", "a\0\r\n", "\u20ac\r\n"],
    ids=repr,
)
def test_value_that_is_no_header(mail, value):
    class Own(open_smtp(add_received_header=1)):
        def generateReceived(self):
            return value

    header, log = message_start(mail, Own)
    assert header == ""
    assert log.find("Couldn't generate received line; error='wrong return value'")


@pytest.mark.parametrize("problem", [ValueError("x"), SystemExit(1)])
def test_exception_leaves_the_message_as_it_is(mail, problem):
    class Own(open_smtp(add_received_header=1)):
        def generateReceived(self):
            raise problem

    header, log = message_start(mail, Own)
    assert header == ""
    assert log.find("Couldn't generate received line; error='exception occurred'")


def test_own_header_of_several_lines(mail):
    class Own(open_smtp(add_received_header=1)):
        def generateReceived(self):
            return "X-Site: \xe9\r\n folded\r\n"

    assert message_start(mail, Own)[0] == "X-Site: \xe9\r\n folded\r\n"


def test_header_of_an_empty_body(mail):
    header, _ = message_start(mail, open_smtp(add_received_header=1), body=b".\r\n")
    assert header.startswith("Received: from ")
    assert header.endswith("\r\n")


def test_first_dot_behind_the_header(mail):
    header, _ = message_start(mail, open_smtp(add_received_header=1), body=b"..dot\r\n.\r\n")
    assert header.startswith("Received: from ")


def test_header_goes_with_the_first_chunk(mail):
    class Own(open_smtp(permit=("CHUNKING",), add_received_header=1)):
        def generateReceived(self):
            return "X: y\r\n"

    with mail(Own) as play:
        play.begin_chunks()
        play.client.send(b"BDAT 3\r\nabcBDAT 2 LAST\r\nde")
        play("S< BDAT 9")
        assert play.server.bytes(9) == b"X: y\r\nabc"
        play("""
            S> 250 ok
            C< 250 ok
            S< BDAT 2 LAST
        """)
        assert play.server.bytes(2) == b"de"


def test_no_header_unless_wanted(mail):
    assert message_start(mail, OpenSmtp)[0] == ""


def test_line_is_folded_and_dated_in_english():
    line = received.received_line(
        helo="a" * 60, client="[1.2.3.4]", host="b" * 60, protocol="ESMTP", message_id="id", now=NOON
    )
    assert all(len(part) <= 110 for part in line.split("\r\n"))
    assert line.count("\r\n\t") == 2
    assert unfolded(line).endswith(time.strftime("%H:%M:%S %z (%Z)", time.localtime(NOON)))
    assert "Nov 2023" in line


def test_helo_cannot_break_the_line():
    line = received.received_line(
        helo="a\r\nb \xe9", client="[1.2.3.4]", host="b", protocol="SMTP", message_id="id", now=NOON
    )
    assert "from a??b?? (" in line


@pytest.mark.parametrize(("ip", "literal"), [("1.2.3.4", "[1.2.3.4]"), ("2001:db8::1", "[IPv6:2001:db8::1]")])
def test_address_literal(ip, literal):
    assert received.address_literal(ip) == literal


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (("SMTP", False, False), "SMTP"),
        (("ESMTP", True, False), "ESMTPA"),
        (("ESMTP", False, True), "UTF8SMTP"),
        (("ESMTP", True, True), "UTF8SMTPA"),
    ],
)
def test_protocol_keyword(facts, word):
    protocol, authenticated, utf8 = facts
    assert received.keyword(protocol, authenticated=authenticated, utf8=utf8) == word


# reverse names


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A name server and a hosts file of this test's own."""
    (tmp_path / "hosts").write_text("# comment\n192.0.2.9 hosts.example alias\nbroken line here\n")
    monkeypatch.setattr(received, "HOSTS", tmp_path / "hosts")
    monkeypatch.setattr(received, "LOOKUP_SECONDS", 0.3)
    with DnsServer() as server:
        host, port = server.address.rsplit(":", 1)

        def resolver():
            made = dns.resolver.Resolver(configure=False)
            made.nameservers, made.port = [host], int(port)
            return made

        monkeypatch.setattr(received, "new_resolver", resolver)
        yield server


def test_name_from_hosts_and_dns(names):
    names.set("1.2.0.192.in-addr.arpa", "PTR", "dns.example.")
    found = received.ReverseNames()
    assert found.name_of("192.0.2.9") == "hosts.example"
    assert found.name_of("192.0.2.1") == "dns.example"
    assert found.name_of("192.0.2.2") == ""
    assert found.name_of("not an address") == ""


def test_name_is_asked_for_once(names):
    names.set("1.2.0.192.in-addr.arpa", "PTR", "dns.example.")
    found = received.ReverseNames()
    for _ in range(3):
        assert found.name_of("192.0.2.1") == "dns.example"
    assert len(names.queries) == 1


def test_silent_name_server_costs_its_time_and_no_more(names):
    names.behaviour = SILENCE
    began = time.monotonic()
    assert received.ReverseNames().name_of("192.0.2.1") == ""
    assert time.monotonic() - began < 10


def test_resolve_host(mail, names, monkeypatch):
    monkeypatch.setattr(received, "reverse_names", received.ReverseNames())
    (received.HOSTS).write_text("127.0.0.1 client.host.example\n")
    header, _ = message_start(mail, open_smtp(add_received_header=1, resolve_host=1))
    assert "from client.example (client.host.example [127.0.0.1])" in unfolded(header)
