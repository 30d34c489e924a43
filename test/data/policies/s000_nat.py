# "Establishing server connections": a pair of services with address translation, in the words of
# that paper (2.x), which lost its addresses in print.  All addresses here are loopback ones.
# The HTTP proxy comes later; a plug carries the bytes.
from Zorp.Core import *
from Zorp.Plug import *

HttpProxy = PlugProxy

InetZone("intra", "127.0.0.0/16", outbound_services=["intra_HTTP_internet"], inbound_services=["internet_HTTP_intra"])
InetZone("dmz", "127.1.0.0/16", outbound_services=[], inbound_services=["internet_HTTP_intra", "intra_HTTP_internet"])
InetZone("internet", "0.0.0.0/0", outbound_services=["internet_HTTP_intra"], inbound_services=["intra_HTTP_internet"])

NATPolicy("intra_to_public", cacheable=TRUE,
          nat=GeneralNAT([(InetDomain("127.0.0.0/24"), InetDomain("127.1.1.0/28"))]))
NATPolicy("public_to_intra",
          nat=GeneralNAT([(InetDomain("192.0.2.0/28"), InetDomain("127.1.2.0/28"))]))


def gateway():
    Service("intra_HTTP_internet", HttpProxy,
            router=DirectedRouter(SockAddrInet("127.1.2.1", $server_port)),
            snat_policy="intra_to_public")
    Service("internet_HTTP_intra", HttpProxy,
            router=TransparentRouter(forced_port=$server_port),
            snat_policy="intra_to_public",
            dnat_policy="public_to_intra")
    Listener(SockAddrInet("127.0.0.1", 50080), "intra_HTTP_internet")
    Listener(SockAddrInet("127.0.0.1", 50081), "internet_HTTP_intra")
