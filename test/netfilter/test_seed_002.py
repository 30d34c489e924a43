"""The reverse proxy of the paper, with its own addresses, between swaks and Postfix.

S002: clients connect to the firewall, 172.16.40.1; the mail server is 172.16.20.254 behind it.  What
the excerpt leaves out is the zone; IPv6 is our addition, in the same words.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from test.support.leaks import Capture, connected
from test.support.net import net
from test.support.postfix import Postfix

__all__ = ["net"]
pytestmark = pytest.mark.netns

EXCERPT = """\
from Zorp.Smtp import *

Zone("dmz", ["172.16.40.0/24", "fd00:40::/64"])

def default_instance():
    Service(name="service_smtp_transparent_directed", # <3>
            proxy_class=SmtpProxy,
            router=DirectedRouter(dest_addr=SockAddrInet('172.16.20.254', 25)$forged) # <2>
    )
    Rule(service='service_smtp_transparent_directed', # <1>
         dst_port=25,
         src_zone=('dmz', ),
         dst_subnet=('172.16.40.1', )
    )

    Service(name="service_smtp_transparent_directed_ipv6",
            proxy_class=SmtpProxy,
            router=DirectedRouter(dest_addr=SockAddrInet6('fd00:20::254', 25)$forged)
    )
    Rule(service='service_smtp_transparent_directed_ipv6',
         dst_port=25,
         src_zone=('dmz', ),
         dst_subnet=('fd00:40::1', )
    )
"""
NETWORKS = [
    # where, device, addresses
    ("client", "c0", ("172.16.40.20/24", "fd00:40::20/64")),
    ("firewall", "fc", ("172.16.40.1/24", "fd00:40::1/64")),
    ("firewall", "fs", ("172.16.20.1/24", "fd00:20::1/64")),
    ("server", "s0", ("172.16.20.254/24", "fd00:20::254/64")),
]
FIREWALL = ("172.16.40.1", "fd00:40::1")
SERVER = ("172.16.20.254", "fd00:20::254")


@pytest.fixture
def postfix(net):
    """A mail server where the paper has it."""
    for where, device, addresses in NETWORKS:
        for address in addresses:
            nodad = ("nodad",) if ":" in address else ()
            getattr(net, where).run("ip", "addr", "add", address, "dev", device, *nodad)
    extra = "inet_interfaces = 172.16.20.254, [fd00:20::254]"
    with Postfix(address=SERVER[0], port=25, extra=extra, prefix=("ip", "netns", "exec", net.server.name)) as mta:
        yield mta


def swaks(net, server: str) -> subprocess.CompletedProcess:
    return net.client.run("swaks", "-6" if ":" in server else "-4", "--server", server, "--from", "ann@example.org",
                          "--to", "bob@example.com", "--helo", "client.example.org", "--timeout", "10",
                          "--body", "through the firewall", check=False)


FORGED = """,
                                  forge_addr=TRUE
                                 """
# The proxy refuses every recipient until the policy says for whom it relays, so delivery needs a class.
RELAYING = EXCERPT.replace("def default_instance", """
class Relaying(SmtpProxy):
    def config(self):
        SmtpProxy.config(self)
        self.relay_domains = ("example.com",)

def default_instance""").replace("proxy_class=SmtpProxy", "proxy_class=Relaying")


@pytest.mark.parametrize(("backend", "forged", "seen"), [
    pytest.param("nft", "", ("172.16.20.1", "fd00:20::1"), id="the firewall's address"),
    pytest.param("legacy-restore", FORGED, ("172.16.40.20", "fd00:40::20"), id="forge_addr=TRUE"),
])
def test_the_server_logs_the_address_that_the_router_shows_it(net, postfix, backend, forged, seen):
    # given the paper's policy
    net.firewall.configure(backend)
    daemon = net.firewall.start_zorp(EXCERPT, "default_instance", forged=forged)
    for firewall, server, peer in zip(FIREWALL, SERVER, seen, strict=True):
        mark = daemon.log.mark()
        # when a client sends a mail to the firewall
        sent = swaks(net, firewall)
        # then it has spoken with the proxy, which refuses recipients by default
        assert "250 2.1.0 Ok" in sent.stdout, sent.stdout + sent.stderr
        assert "554 5.7.1 Relaying denied." in sent.stdout
        session = daemon.log.wait_for("core.summary", 4, "Connection summary", after=mark)
        assert (session.fields["client_local"], session.fields["server_address"]) == (firewall, server)
        # and the server's log names whom the router shows it
        assert re.search(rf"smtpd\[\d+\]: connect from unknown\[{peer}\]", postfix.log), postfix.log
    # and where the policy says for whom it relays
    daemon.reload(RELAYING)
    for count, (firewall, peer) in enumerate(zip(FIREWALL, seen, strict=True), start=1):
        sent = swaks(net, firewall)
        # then the mail is delivered, with that address in its header
        assert sent.returncode == 0, sent.stdout + sent.stderr
        mail = postfix.wait_for_mails(count)[-1].decode()
        assert "through the firewall" in mail
        assert re.search(rf"Received: from client\.example\.org \(unknown \[(IPv6:)?{peer}\]\)", mail), mail
    assert set(re.findall(r" connect from unknown\[(.*?)\]", postfix.log)) == set(seen)


def test_clients_reach_the_server_through_the_proxy_only(net, postfix):
    # given the paper's policy
    net.firewall.configure("nft")
    net.firewall.start_zorp(EXCERPT, "default_instance", forged="")
    with Capture(net.server) as capture:
        # when a client addresses the server itself, or another port of the firewall
        others = [(address, 25) for address in SERVER] + [(address, 587) for address in FIREWALL]
        reached = connected(net.client, others)
        # then nobody answers, and the server hears nothing
        assert reached == []
        assert capture.arrived() == []
