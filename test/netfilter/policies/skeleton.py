"""A proxy, a forwarded and a refused service; zones inside each other."""
from Zorp.Core import *
from Zorp.Plug import *

Zone("internet", "0.0.0.0/0")
Zone("office", "10.1.0.0/24")
Zone("lab", "10.1.0.64/26")


def instance():
    config.options.rule_listen_port = 50080
    Service("web", PlugProxy)
    PFService("app", router=DirectedRouter(SockAddrInet("10.2.0.2", 7000)))
    DenyService("no", ipv4_setting=DenyIPv4.TCP_RESET)
    Rule(rule_id=7, iface="fc", proto=6, dst_port=80, src_zone="office", dst_zone="internet", service="web")
    Rule(rule_id=8, iface="fc", proto=6, dst_port=700, service="app")
    Rule(rule_id=9, iface="fc", proto=6, dst_port=80, src_zone="lab", service="no")
