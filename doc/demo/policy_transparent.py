"""The policy of the transparent part of `make demo`: clients and servers do not know of the firewall.

Clients address the servers themselves.  What the rules do not name does not pass.
"""

from Zorp.Core import *
from Zorp.Smtp import *

Zone("internet", ["0.0.0.0/0", "::/0"])
Zone("office", ["10.1.0.0/24", "fd00:1::/64"])


class MailForUs(SmtpProxy):
    """Mail for example.com and nothing else."""

    def config(self):
        SmtpProxy.config(self)
        self.relay_domains = ("example.com",)


def demo():
    # a proxy speaks with both sides; the server is shown the client's address
    Service("mail", MailForUs, router=TransparentRouter(forge_addr=TRUE))
    # the kernel passes packets on, in the firewall's name
    PFService("echo", router=TransparentRouter())
    # the kernel says no
    DenyService("telnet", ipv4_setting=DenyIPv4.TCP_RESET, ipv6_setting=DenyIPv6.TCP_RESET)

    Rule(proto=6, dst_port=25, src_zone="office", service="mail")
    Rule(proto=6, dst_port=7, src_zone="office", service="echo")
    Rule(proto=6, dst_port=23, src_zone="office", service="telnet")
