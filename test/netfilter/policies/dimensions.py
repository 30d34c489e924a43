"""Every dimension of a rule, alternatives included."""
from Zorp.Core import *
from Zorp.Plug import *

Zone("world", ["0.0.0.0/0", "::/0"])
Zone("half", "128.0.0.0/1")
Zone("site", ["10.0.0.0/8", "2001:db8::/32"])
Zone("site.a", "10.1.0.0/16", admin_parent="site")
Zone("other", "10.1.7.0/24")
Zone("a zone with a name that is far too long for the kernel", "192.0.2.0/24")


def instance():
    config.options.rule_listen_port = 50080
    DenyService("quiet", logging=False, ipv6_setting=DenyIPv6.ICMP_NO_ROUTE)
    Service("web", PlugProxy)
    Rule(rule_id=10, service="web", iface=("eth0", "eth1"), ifgroup=2, dst_port=80)
    Rule(rule_id=11, service="web", dst_iface="eth0", dst_ifgroup=3, dst_zone="site", dst_port=81)
    Rule(rule_id=12, service="web", src_zone=("site", "site.a", "half"), src_port=PortRange(1024, 65535), proto=6)
    Rule(rule_id=13, service="web", src_subnet=("10.0.0.1", "10.0.0.2", "172.16.0.0/12", "2001:db8::1"),
         dst_zone="world")
    Rule(rule_id=14, service="quiet", proto_type=8, proto_subtype=(0, 1))
    Rule(rule_id=15, service="quiet", proto=(47, 50), dst_port=PortRange(0, 10))
    Rule(rule_id=16, service="web", reqid=7)
    Rule(rule_id=17, service="quiet", src_zone="a zone with a name that is far too long for the kernel")
