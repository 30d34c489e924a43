"""Example policy: a mail server in the DMZ behind an SMTP proxy, and one plain TCP service.

Copy it, change addresses and domains, then:

    zorp --as mail --policy /etc/zorp/policy.py --check-policy
    zorpctl start mail
"""

from Zorp.Core import *
from Zorp.Plug import *
from Zorp.Smtp import *

from zones import *


class IncomingMail(SmtpProxy):
    """Mail for our domain from anyone; nothing else is relayed."""

    def config(self):
        SmtpProxy.config(self)
        self.relay_domains = ("example.com", ".example.com")
        self.relay_zones = ("office",)


def mail():
    """Clients connect to the firewall's port 25; the server sees their real address."""
    Service(name="mail_in",
            proxy_class=IncomingMail,
            router=DirectedRouter(dest_addr=SockAddrInet("172.16.40.25", 25), forge_addr=TRUE),
            limit_target_zones_to=["dmz"],
            max_instances=200)
    Dispatcher(DBSockAddr(SockAddrInet("0.0.0.0", 25), ZD_PROTO_TCP), service="mail_in")


def news():
    """A protocol we do not know: bytes are copied, addresses are checked."""
    Service(name="news", proxy_class=PlugProxy, router=DirectedRouter(SockAddrInet("172.16.40.119", 119)))
    Dispatcher(DBSockAddr(SockAddrInet("0.0.0.0", 119), ZD_PROTO_TCP), service="news")
