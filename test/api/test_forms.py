"""Constructor forms that a signature cannot tell apart: releases put different things in one position.

Each case is a call as a release's policies write it, and what must come of it.
"""

from __future__ import annotations

import pytest

from test.support.world import policy_world

FORMS = {
    # 0.6: address and mask, parent as an object
    "zone 0.6": ("InetZone('office', '10.20.0.0', '255.255.0.0', None)",
                 {"name": "office", "subnets[0].mask_bits": 16, "admin_parent": None}),
    # up to 3.9.6: permission lists, then the parent, then umbrella
    "zone 3.9.0": ("InetZone('lan', '10.1.0.0/16', ['*'], ['web'], 'internet', 1)",
                   {"name": "lan", "admin_parent.name": "internet", "umbrella": 1}),
    "zone 3.9.0 keywords": ("InetZone(name='lan', addr='10.1.0.0/16', outbound_services=['*'], inbound_services=[])",
                            {"name": "lan", "subnets[0].mask_bits": 16}),
    "zone 3.9.5": ("Zone('lan', ['10.1.0.0/16', '2001:db8:1::/48'], ['*'], ['lan_web'])",
                   {"lookup(SockAddrInet6('2001:db8:1::5', 0)).getName()": "lan"}),
    # 3.9.8: the parent comes third
    "zone 3.9.8": ("Zone('lan', ('10.1.0.0/16',), 'internet')", {"admin_parent.name": "internet"}),
    # 5.0 and later: host names third, the parent fourth
    "zone 5.0": ("Zone('lan', ('10.1.0.0/16',), (), 'internet')",
                 {"admin_parent.name": "internet", "hostnames": ()}),
    "zone 7.0 keywords": ("Zone(name='lan', addrs=['10.1.0.0/16'], hostnames=[], admin_parent='internet')",
                          {"admin_parent.name": "internet"}),
    "zone of one text": ("Zone('lan', '10.1.0.0/16')", {"subnets[0].mask_bits": 16}),
    # services: 0.8 has the chainer second
    "service 0.8": ("Service('s', TransparentChainer(), PlugProxy)", {"proxy_class.__name__": "PlugProxy"}),
    "service 2.0": ("Service('s', PlugProxy, TransparentRouter())", {"router.forced_port": 0}),
    "service 2.x NAT": ("Service('s', PlugProxy, snat=GeneralNAT([(InetDomain('10.0.0.0/8'),"
                        " InetDomain('192.0.2.0/24'))]))", {"snat_policy.name": "__s-snat"}),
    "service 7.0": ("Service(name='s', proxy_class=PlugProxy, max_instances=5, limit_target_zones_to=('internet',))",
                    {"max_instances": 5}),
    # chainers
    "failover 1.0": ("FailoverChainer([SockAddrInet('192.0.2.1', 80), SockAddrInet('192.0.2.2', 80)])",
                     {"hosts[1].ip_s": "192.0.2.2", "current_host": 0}),
    "failover 7.0": ("FailoverChainer(ZD_PROTO_TCP, 0, 1000, 500, TRUE)",
                     {"protocol": 1, "timeout_connect": 500, "round_robin": 1}),
    "directed chainer 0.6": ("DirectedChainer(None, SockAddrInet('192.0.2.1', 119))",
                             {"remote.port": 119, "local": None}),
    "directed chainer 1.0": ("DirectedChainer(SockAddrInet('192.0.2.1', 119), SockAddrInet('192.0.2.9', 0))",
                             {"remote.port": 119, "local.ip_s": "192.0.2.9"}),
    "chainer without protocol": ("AbstractChainer()", {"protocol": 0}),
    # routers
    "directed to one": ("DirectedRouter(SockAddrInet('192.0.2.1', 80))", {"dest_addr[0].port": 80}),
    "directed to several": ("DirectedRouter([SockAddrInet('192.0.2.1', 80), SockAddrInet('192.0.2.2', 81)], TRUE)",
                            {"dest_addr[1].port": 81, "forge_addr": 1}),
    "transparent 2.0": ("TransparentRouter(8080, TRUE)", {"forced_port": 8080, "forge_addr": 1}),
    # addresses
    "everything": ("InetDomain()", {"mask_bits": 0}),
    "everything by an empty text": ("InetDomain('')", {"mask_bits": 0}),
    # NAT: pairs up to 3.9.3, triples from 3.2 on
    "pairs": ("GeneralNAT([(InetDomain('10.0.0.0/8'), InetDomain('192.0.2.0/24'))])", {}),
    "triples": ("GeneralNAT([(InetSubnet('10.0.0.0/8'), InetSubnet('0.0.0.0/0'), InetSubnet('192.0.2.0/24'))])", {}),
    # listeners
    "listener of a service object": ("Listener(SockAddrInet('127.0.0.1', 0), Service('s', PlugProxy))",
                                     {"protocol": 1}),
    "dispatcher of a bare address": ("Dispatcher(SockAddrInet('127.0.0.1', 0), 'svc')", {"protocol": 1}),
    "dispatcher of several": ("Dispatcher([DBSockAddr(SockAddrInet('127.0.0.1', 0), ZD_PROTO_TCP),"
                              " DBSockAddr(SockAddrInet('127.0.0.2', 0), ZD_PROTO_TCP)], 'svc')", {}),
    # sessions: none up to 3.9, four in 5.0, five and more later
    "session 3.9": ("MasterSession()", {"client_zone": None, "auth_user": ""}),
    "session 5.0": ("MasterSession(ZD_PROTO_TCP, Service('s', PlugProxy), ClientInfo(None, None, None,"
                    " SockAddrInet('192.0.2.1', 5)), 3)",
                    {"protocol": 1, "instance_id": 3, "client_address.port": 5, "client_zone.name": "internet"}),
    "session 7.0": ("MasterSession(Service('s', PlugProxy), None, SockAddrInet('192.0.2.2', 80),"
                    " DBSockAddr(SockAddrInet('127.0.0.1', 80), ZD_PROTO_TCP), SockAddrInet('192.0.2.1', 5),"
                    " rule_id=9, instance_id=4)",
                    {"rule_id": 9, "instance_id": 4, "protocol_name": "TCP", "client_zone.name": "internet"}),
    # rules: one thing where several may stand
    "rule of bare values": ("Rule(service='svc', src_zone='internet', dst_port=80, proto=6)", {}),
    "rule of sequences": ("Rule(service='svc', src_zone=('internet',), dst_port=[443, PortRange(8440, 8450)])", {}),
    "rule by old names": ("Rule(service='svc', src_iface='lo', icmp_type=8, proto=1)", {}),
}

REFUSED = {
    "both address keywords": ("Zone('lan', addr='10.1.0.0/16', addrs=['10.2.0.0/16'])", TypeError),
    "service without a proxy": ("Service('s', TransparentRouter(), PlugProxy)", ValueError),
    "two kinds of NAT": ("Service('s', PlugProxy, snat=StaticNAT(SockAddrInet('192.0.2.1', 0)), snat_policy='n')",
                         ValueError),
    "unknown dispatcher keyword": ("Dispatcher(SockAddrInet('127.0.0.1', 0), 'svc', backlogg=5)", TypeError),
    "unknown rule dimension": ("Rule(service='svc', dst_prot=80)", Exception),
    "unknown service": ("Dispatcher(SockAddrInet('127.0.0.1', 0), 'nobody')", Exception),
}


def _outcome(text, paths=()):
    """Make something as a policy would write it and return what the paths say about it."""
    with policy_world() as names:
        names["Service"]("svc", names["PlugProxy"])
        scope = dict(names)
        for module in ("Session", "Chainer", "Router"):
            exec(f"from Zorp.{module} import *", scope)
        scope["made"] = eval(text, scope)
        return {path: eval(f"made.{path}", scope) for path in paths}


@pytest.mark.parametrize(("text", "expected"), FORMS.values(), ids=FORMS)
def test_a_call_of_an_old_release_means_what_it_meant(text, expected):
    # when a policy makes an object in the words of its time
    # then the arguments have arrived where that release put them
    assert _outcome(text, expected) == expected


@pytest.mark.parametrize(("text", "kind"), REFUSED.values(), ids=REFUSED)
def test_a_call_that_no_release_understood_is_refused(text, kind):
    # when a policy mixes what does not go together, then it does not load
    with pytest.raises(kind):
        _outcome(text)
