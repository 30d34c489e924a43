"""So many ports that they are split."""
from Zorp.Core import *
from Zorp.Plug import *

Zone("site", "10.0.0.0/8")


def instance():
    config.options.rule_listen_port = 50080
    DenyService("no")
    Service("web", PlugProxy)
    for port in range(8000, 8012):
        Rule(service="web", dst_port=port, src_zone="site")
    Rule(service="web", dst_port=PortRange(8005, 8020), src_subnet="192.0.2.0/24")
    Rule(service="no", src_zone="site")
    Rule(service="no", proto=17)
