"""Every form of address translation."""
from Zorp.Core import *
from Zorp.Plug import *

NATPolicy("hide", nat=GeneralNAT([
    (InetSubnet("10.1.0.0/24"), InetSubnet("203.0.113.0/24"), InetSubnet("192.0.2.0/24")),
    (InetSubnet("10.0.0.0/8"), InetSubnet("0.0.0.0/0"), InetSubnet("198.51.100.7/32")),
]))
NATPolicy("publish", nat=GeneralNAT([
    (InetSubnet("0.0.0.0/0"), InetSubnet("192.0.2.0/24"), InetSubnet("10.2.0.0/24")),
    (Inet6Subnet("::/0"), Inet6Subnet("2001:db8:1::/64"), Inet6Subnet("2001:db8:2::/64")),
]))
NATPolicy("move", nat=GeneralNAT([
    (InetSubnet("10.9.0.0/16"), InetSubnet("10.2.0.0/24"), InetSubnet("10.3.0.0/24")),
]))


def instance():
    PFService("hidden", snat_policy="hide")
    PFService("published", router=TransparentRouter(forge_addr=TRUE), dnat_policy="publish")
    PFService("directed", router=DirectedRouter(SockAddrInet("10.2.0.2", 8080), forge_addr=TRUE),
              snat_policy="hide", dnat_policy="move")
    PFService("plain", router=TransparentRouter(forge_addr=TRUE))
    PFService("six", router=DirectedRouter(SockAddrInet6("2001:db8::2", 0)))
    Rule(service="hidden", dst_port=80)
    Rule(service="published", dst_port=81)
    Rule(service="directed", dst_port=82)
    Rule(service="plain", proto=1)
    Rule(service="six", dst_port=83)
