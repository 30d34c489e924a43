# "Module Chainer", the first-generation reference (0.8, 1.0): chainers decide where to connect and
# stand between the service's name and its proxy.  The HTTP proxy comes later; a plug stands in.
from Zorp.Core import *
from Zorp.Plug import *

HttpProxy = PlugProxy

InetZone("inter", "0.0.0.0/0", outbound_services=["*"], inbound_services=["*"])


def gateway():
    Service("inter_HTTP_dmz",
            DirectedChainer(SockAddr('127.0.0.1', $server_port)),
            HttpProxy)
    Service("http", TransparentChainer(), HttpProxy)
    Service("either",
            FailoverChainer([SockAddr('127.0.0.1', $dead_port), SockAddr('127.0.0.1', $server_port)]),
            HttpProxy)
    Service("named", InbandChainer(), HttpProxy)
    Listener(SockAddr('127.0.0.1', 50080), "inter_HTTP_dmz")
    Listener(SockAddr('127.0.0.1', 50081), "http")
    Listener(SockAddr('127.0.0.1', 50082), "either")
