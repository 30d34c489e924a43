"""Real mail through a real firewall process: Postfix behind it; swaks, smtplib and smtp-source before it."""

from __future__ import annotations

import hashlib
import re
import signal
import smtplib
import socket
import subprocess
from pathlib import Path

import pytest

from test.support.daemon import Daemon
from test.support.postfix import Postfix, body_of

POLICY = """
    from Zorp.Core import *
    from Zorp.Smtp import *

    Zone("internet", ["0.0.0.0/0", "::/0"])
    Zone("office", ["127.0.0.0/8"])

    class Mail(SmtpProxy):
        def config(self):
            SmtpProxy.config(self)
            self.relay_domains = ("example.com",)
            $settings

    def intra():
        Service(name="mail", proxy_class=Mail,
                router=DirectedRouter(dest_addr=SockAddrInet("127.0.0.1", $server_port)))
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="mail")
    """
SENDER, RECIPIENT = "ann@example.org", "bob@example.com"
HEADER = b"From: Ann <ann@example.org>\r\nSubject: test\r\n\r\n"


@pytest.fixture(scope="module")
def postfix():
    with Postfix() as mta:
        yield mta


@pytest.fixture(scope="module")
def firewall(postfix, tmp_path_factory):
    """A firewall that only watches: one instance for all tests of this module."""
    daemon = Daemon(tmp_path_factory.mktemp("firewall"), POLICY, verbosity=4, server_port=postfix.port, settings="pass")
    yield daemon.start()
    daemon.end()


def send(port: int, body: bytes, **options) -> None:
    """One mail with smtplib, body as it is (CRLF line ends)."""
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.example.org", timeout=60) as client:
        client.sendmail(SENDER, [RECIPIENT], HEADER + body, **options)


BODIES = {
    "plain": b"Hello\r\nBob\r\n",
    "empty": b"",
    "one empty line": b"\r\n",
    "leading dots": b".\r\n..\r\n...\r\n.x\r\n x.\r\n",
    "dot at the end": b"text\r\n.\r\n",
    "8-bit": bytes(range(128, 256)) + b"\r\n" + "árvíztűrő".encode() + b"\r\n",
    "control characters": b"\x01\x02\x0b\x0c\x1b\x7f\r\n",
    "line of 60 000 bytes": b"x" * 60_000 + b"\r\n",
    "60 000 bytes of dots": b"." * 60_000 + b"\r\n",
    "many short lines": b".\r\n\r\n" * 5000,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_arrives_byte_for_byte(body, postfix, firewall):
    # given a mail server behind the firewall
    before = postfix.count()
    # when a client sends this body
    send(firewall.port, body)
    # then the server stores exactly these bytes
    mail = postfix.wait_for_mails(before + 1)[-1]
    assert body_of(mail).replace(b"\n", b"\r\n") == body


def test_fifty_megabytes_arrive_and_memory_stays_bounded(postfix, firewall):
    # given a mail of 50 MB with 8-bit bytes, long lines and dots
    line = bytes(range(128, 256)) * 8 + b"." + b"y" * 59_000 + b"\r\n.\r\n"
    body = line * (50_000_000 // len(line))
    before, status = postfix.count(), Path(f"/proc/{firewall.worker_pid()}/status")
    # when it goes through the firewall
    send(firewall.port, body)
    # then it arrives unchanged, and the worker never held more than a fraction of it
    mail = postfix.wait_for_mails(before + 1)[-1]
    arrived = body_of(mail).replace(b"\n", b"\r\n")
    assert hashlib.sha256(arrived).digest() == hashlib.sha256(body).digest()
    peak_kib = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    assert peak_kib < 100_000


@pytest.mark.parametrize("options", [[], ["--pipeline"]], ids=["one by one", "pipelined"])
def test_swaks_delivers_and_the_log_accounts_for_it(options, postfix, firewall):
    # given a firewall and a mark in its log
    before, mark = postfix.count(), firewall.log.mark()
    # when swaks sends a mail to two recipients
    result = subprocess.run(
        ["swaks", "--server", f"127.0.0.1:{firewall.port}", "--from", SENDER, "--to", f"{RECIPIENT},carl@example.com",
         "--helo", "client.example.org", "--body", "hello from swaks", *options],
        capture_output=True, text=True, timeout=60, check=False)
    # then both deliveries arrive, and one accounting line names sender and recipients
    assert result.returncode == 0, result.stdout + result.stderr
    assert b"hello from swaks" in postfix.wait_for_mails(before + 2)[-1]
    line = firewall.log.wait_for("smtp.accounting", 4, "Accounting", after=mark)
    assert line.fields["sender"] == SENDER
    assert line.fields["recipient"].split() == [RECIPIENT, "carl@example.com"]
    assert line.fields["result"] == "success"


def test_a_recipient_elsewhere_is_refused_and_the_server_never_hears_of_it(postfix, firewall):
    with smtplib.SMTP("127.0.0.1", firewall.port, timeout=30) as client:
        client.ehlo("client.example.org")
        client.mail(SENDER)
        assert client.rcpt("victim@elsewhere.example") == (554, b"5.7.1 Relaying denied.")
    assert "elsewhere.example" not in postfix.log


def test_two_thousand_mails_from_32_parallel_clients_arrive_once_each(postfix, firewall):
    # given 2000 mails in 32 parallel sessions
    before, mark = postfix.count(), firewall.log.mark()
    subprocess.run(["smtp-source", "-s", "32", "-m", "2000", "-l", "1000", "-N", "-f", SENDER, "-t", RECIPIENT,
                    f"127.0.0.1:{firewall.port}"], check=True, timeout=120)
    # when all have been delivered
    mails = postfix.wait_for_mails(before + 2000, seconds=60)
    # then none is missing, none came twice (every recipient has a number of its own)
    numbers = {re.search(rb"^X-Original-To: (\d+)", mail, re.M)[1] for mail in mails[before:]}
    assert len(mails) - before == len(numbers) == 2000
    # and every session was accounted for
    firewall.log.wait_for("core.session", 4, "Ending proxy instance", after=mark, count=2000, timeout_s=20)
    started = {line.session for line in firewall.log.find("core.session", 3, "Starting proxy instance", after=mark)}
    accepted = {line.session for line in firewall.log.find("core.summary", 4, after=mark, verdict="ACCEPTED")}
    assert len(started) == 2000
    assert started <= accepted


def test_a_client_that_goes_in_mid_body_delivers_nothing(postfix, firewall):
    # given a client in the middle of a body
    before, mark = postfix.count(), firewall.log.mark()
    with socket.create_connection(("127.0.0.1", firewall.port), 10) as client:
        dialogue(client, b"", b"220")
        dialogue(client, b"EHLO client.example.org\r\n", b"250 ")
        dialogue(client, b"MAIL FROM:<ann@example.org>\r\n", b"250 ")
        dialogue(client, b"RCPT TO:<bob@example.com>\r\n", b"250 ")
        dialogue(client, b"DATA\r\n", b"354")
        client.sendall(b"Subject: half\r\n\r\nhalf a m")
    # when it has gone, and another mail has been delivered after it
    firewall.log.wait_for("core.session", 4, "Ending proxy instance", after=mark)
    send(firewall.port, b"whole\r\n")
    # then only the second is there
    mails = postfix.wait_for_mails(before + 1)[before:]
    assert [body_of(mail) for mail in mails] == [b"whole\n"]


def dialogue(client: socket.socket, command: bytes, expected: bytes) -> bytes:
    """Send a command, read until a last reply line that starts as expected."""
    client.sendall(command)
    answer = b""
    while not re.search(rb"^\d{3} .*\r\n", answer, re.M):
        data = client.recv(4096)
        assert data, f"closed after {answer!r}"
        answer += data
    assert answer.splitlines()[-1].startswith(expected.strip()), answer
    return answer


@pytest.mark.parametrize("by", ["stop", "reload"])
def test_clients_are_told_when_the_service_ends(by, postfix, zorp):
    # given a client between two commands, and an instance that ends old sessions a second after a reload
    daemon = zorp(POLICY, server_port=postfix.port, settings="pass", arguments=["--drain-timeout", "1"])
    with daemon.connect() as client, client.makefile("rb") as replies:
        assert replies.readline().startswith(b"220 ")
        # when the instance stops or reloads
        daemon.kill(signal.SIGTERM if by == "stop" else signal.SIGHUP)
        # then it hears so, in order, and the summary says why
        assert replies.read() == b"421 Service not available, closing transmission channel.\r\n"
    line = daemon.log.wait_for("core.summary", 4, "Connection summary")
    assert (line.fields["verdict"], line.fields["info"]) == ("ACCEPTED", "instance stopped")


def test_the_received_header_names_client_and_firewall(postfix, zorp):
    # given a policy that adds a Received header
    daemon = zorp(POLICY, server_port=postfix.port,
                  settings="self.add_received_header = TRUE; self.domain_name = 'fw.example'")
    before = postfix.count()
    # when a mail passes
    send(daemon.port, b"x\r\n")
    # then the stored mail names who sent it, through which door
    mail = postfix.wait_for_mails(before + 1)[-1]
    received = rb"^Received: from client\.example\.org \(\[127\.0\.0\.1\]\)\s+by fw\.example with ESMTP id "
    assert re.search(received, mail, re.M)
