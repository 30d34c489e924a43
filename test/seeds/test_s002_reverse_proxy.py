"""S002, reverse proxy: mail for the firewall's own address goes to a server behind it."""

from __future__ import annotations

import pytest

from test.seeds import POLICIES, covers
from test.support.gateway import Gateway, Server, ended

POLICY = POLICIES / "s002_reverse_proxy.policy"
FIREWALL = ("172.16.40.1", 25)
CLIENT = "127.0.5.20"


class MailServer(Server):
    """Says yes to everything and keeps what it was told."""

    def __init__(self):
        self.lines = []
        super().__init__(self._talk, host="127.16.20.254", greeting=b"220 mail ready\r\n")

    def _talk(self, sock):
        for line in sock.makefile("rb"):
            self.lines.append(line.rstrip(b"\r\n"))
            if self.lines[-1].upper().startswith(b"QUIT"):
                sock.sendall(b"221 bye\r\n")
                return
            sock.sendall(b"250 ok\r\n")


class Dialogue:
    """A mail client, a line at a time."""

    def __init__(self, sock):
        self._file = sock.makefile("rwb")

    def reply(self):
        """Return the last line of the next reply."""
        while True:
            line = self._file.readline().rstrip(b"\r\n")
            if line[3:4] != b"-":
                return line

    def say(self, line):
        """Send a command and return the reply."""
        self._file.write(line + b"\r\n")
        self._file.flush()
        return self.reply()


@pytest.fixture
def server():
    with MailServer() as running:
        yield running


@pytest.fixture
def gateway(server):
    with Gateway(POLICY, "default_instance", server_port=server.port, more="") as running:
        yield running


@covers("S002-1", "S002-3", "S002-4", "S002-5", "S002-6", "S002-12", "S002-13", "S002-14", "S002-17")
def test_mail_for_the_firewall_reaches_the_server_behind_it(server, gateway):
    # when a plain mail client talks to the firewall's address
    mail = Dialogue(gateway.connect(to=FIREWALL, source=CLIENT))
    greeting = mail.reply()
    replies = [mail.say(line) for line in (b"EHLO client.example", b"NOOP", b"QUIT")]
    # then it notices nothing, and the origin's peer is the firewall, not the client
    assert greeting.startswith(b"220")
    assert [reply[:3] for reply in replies] == [b"250", b"250", b"221"]
    assert server.lines[0].upper().startswith(b"EHLO")
    assert server.peers[0][0] not in (CLIENT, FIREWALL[0])


@covers("S002-4")
def test_the_excerpt_as_printed_runs_once_its_zones_exist(zorp):
    # given the paper's text without the import that an excerpt leaves out
    excerpt = POLICY.read_text("utf-8").replace("from Zorp.Core import *\n", "")
    daemon = zorp(excerpt, instance="default_instance", server_port=25, more="")
    # then it serves, and the administrator is told which names were taken from Zorp.Core
    names = [line.fields["name"] for line in daemon.log.find("core.policy", 2, "Name is not imported")]
    assert names == ["Zone", "Service", "DirectedRouter", "SockAddrInet", "Rule"]


@covers("S002-4")
def test_the_excerpt_without_its_zones_is_refused_with_the_line(zorp):
    # given the excerpt alone
    excerpt = POLICY.read_text("utf-8").replace("from Zorp.Core import *\n", "")
    excerpt = excerpt.replace('Zone("dmz", ["127.0.5.0/24"])\nZone("internet", ["0.0.0.0/0"])\n', "")
    daemon = zorp(excerpt, instance="default_instance", server_port=25, more="", start=False)
    # when an instance starts with it
    status = daemon.run()
    # then it does not, and the place is named
    assert status == 2
    line = excerpt[:excerpt.index("Rule(service=")].count("\n") + 1
    assert f"policy.py:{line}: No zone was defined with that name; zone='dmz'" in daemon.log.text()


@covers("S002-2")
def test_the_dialogue_is_inspected(server, gateway):
    # given a client that asks for something nobody should
    mail = Dialogue(gateway.connect(to=FIREWALL, source=CLIENT))
    mail.reply()
    mail.say(b"EHLO client.example")
    # when it sends a command that the proxy does not know
    reply = mail.say(b"DEBUG")
    # then the proxy answers, and the server never sees it
    assert reply[:1] == b"5"
    assert b"DEBUG" not in b" ".join(server.lines)
    mail.say(b"QUIT")


@covers("S002-7")
def test_the_router_holds_one_address(server, gateway):
    # given the service of the paper
    router = gateway.service("service_smtp_transparent_directed").router
    # then its destination is the origin's
    assert [(address.ip_s, address.port) for address in router.dest_addr] == [("127.16.20.254", server.port)]


OTHERS = {
    "another address of the firewall": (("172.16.40.2", 25), CLIENT),
    "another port": (("172.16.40.1", 26), CLIENT),
    "another zone": (FIREWALL, "127.0.6.20"),
}


@covers("S002-8", "S002-9")
@pytest.mark.parametrize(("destination", "source"), OTHERS.values(), ids=OTHERS)
def test_the_rule_matches_only_what_it_names(server, gateway, destination, source):
    # when a client differs from the rule in one thing
    client = gateway.connect(to=destination, source=source)
    # then nobody serves it
    assert ended(client)
    assert server.peers == []


BROKEN = {
    "zone": ("""
        Zone("internet", ["0.0.0.0/0"])
        def gateway():
            Service("mail", PlugProxy)
            Rule(service="mail", dst_port=25, src_zone=("dmz", ))
        """, "dmz"),
    "service": ("""
        Zone("internet", ["0.0.0.0/0"])
        def gateway():
            Rule(service="mail", dst_port=25)
        """, "mail"),
}


@covers("S002-10", "S002-11")
@pytest.mark.parametrize(("policy", "unknown"), BROKEN.values(), ids=BROKEN)
def test_a_rule_that_names_what_is_not_there_is_refused(policy, unknown):
    # given a rule with a zone or a service that nobody has defined
    text = "\n        from Zorp.Core import *\n        from Zorp.Plug import *" + policy
    # when the policy is loaded
    with pytest.raises(Exception, match=unknown) as refusal, Gateway(text):
        pass
    # then the message names what is missing
    assert unknown in str(refusal.value)


FORGED = {
    "address": (", forge_addr=TRUE", False),
    "address and port": (", forge_addr=TRUE, forge_port=Z_PORT_EXACT", True),
}


@covers("S002-15", "S002-16")
@pytest.mark.parametrize(("more", "same_port"), FORGED.values(), ids=FORGED)
def test_the_server_can_be_shown_the_client(server, more, same_port):
    # given the paper's variant with forged addresses
    with Gateway(POLICY, "default_instance", server_port=server.port, more=more) as gateway:
        # when a client comes
        client = gateway.connect(to=FIREWALL, source=CLIENT)
        Dialogue(client).reply()
        # then the origin sees it, with its own port when the policy says so
        host, port = server.wait_for_peers(1)[0]
        assert host == CLIENT
        assert (port == client.getsockname()[1]) == same_port
