# "Accepting incoming connections": two listeners, one with a fixed service, one that decides by
# client and server zone, in the words of 2.x.  All addresses are loopback or documentation ones.
from Zorp.Core import *
from Zorp.Plug import *

InetZone("office", "127.0.0.0/24", outbound_services=["office_fixed", "office_dmz", "any"], inbound_services=["*"])
InetZone("lab", "127.0.1.0/24", admin_parent="office", inbound_services=["*"])
InetZone("dmz", "127.2.0.0/16", outbound_services=[], inbound_services=["*"])
InetZone("internet", "0.0.0.0/0", outbound_services=["any"], inbound_services=["*"])


class Observed(PlugProxy):
    """Tells the test what its session knows."""

    def config(self):
        PlugProxy.config(self)
        SEEN.setdefault("sessions", []).append(self.session)
        SEEN.setdefault("services", []).append(self.session.service.name)


def gateway():
    router = DirectedRouter(SockAddrInet("127.0.0.1", $server_port))
    Service("office_fixed", Observed, router=router)
    Service("office_dmz", Observed, router=router)
    Service("any", Observed, router=router)
    Service("office_only", Observed, router=router)
    Listener(SockAddrInet("127.0.0.1", 50080), "office_fixed")
    CSZoneListener(SockAddrInet("127.0.0.1", 50081), follow_parent=TRUE,
                   services={("office", "dmz"): "office_dmz", ("*", "*"): "any"})
