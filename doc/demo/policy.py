"""The policy of `make demo`: a mail server behind the firewall, reached through an SMTP proxy.

Clients connect to the firewall on 127.0.0.1; the mail goes on to the origin server, also on
127.0.0.1.  The demo chooses free ports and passes them in the environment.
"""

import os

from Zorp.Core import *
from Zorp.Smtp import *

CLIENT_PORT = int(os.environ.get("DEMO_CLIENT_PORT", "2525"))
ORIGIN_PORT = int(os.environ.get("DEMO_ORIGIN_PORT", "2526"))

Zone("internet", ["0.0.0.0/0", "::/0"])
Zone("office", ["127.0.0.0/8"])


class MailForUs(SmtpProxy):
    """Mail for example.com and nothing else; the server learns who sent it through which door."""

    def config(self):
        SmtpProxy.config(self)
        self.relay_domains = ("example.com",)
        self.add_received_header = TRUE


def demo():
    Service("mail", MailForUs, router=DirectedRouter(SockAddrInet("127.0.0.1", ORIGIN_PORT)))
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", CLIENT_PORT), ZD_PROTO_TCP), service="mail")
