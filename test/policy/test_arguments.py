"""Every argument of every class that policies use: a wrong value is a load error that says what to write instead.

Each class has one good call in GOOD.  The table of tests replaces one argument at a time by each
of WRONG; the object is made, or the policy is refused in words, and what was made keeps working.
"""

from __future__ import annotations

import contextlib
import re

import pytest

from Zorp import Cache
from Zorp.Exceptions import PolicyError, ZorpException

from test.support.world import policy_world

_INET = "SockAddrInet('192.0.2.1', 50080)"
_BIND = "bindto=DBSockAddr(SockAddrInet('127.0.0.1', 0), ZD_PROTO_TCP)"
_NET = "InetSubnet('10.0.0.0/8')"
_MULTI = "protocol=ZD_PROTO_AUTO, timeout_connect=None, proxy_protocol=0"
_STATE = f"{_MULTI}, timeout_state=None"

GOOD = {
    "CSZoneDispatcher": f"{_BIND}, services={{('internet', 'internet'): 'svc'}}, follow_parent=FALSE",
    "CombineMatcher": "expr=(Z_NOT, RegexpMatcher(['a']))",
    "ConnectChainer": _MULTI,
    "DBIface": "iface='lo', port=50080, family=AF_INET, protocol=ZD_PROTO_TCP, ip='0.0.0.0'",
    "DBIfaceGroup": "group=5, port=50080, family=AF_INET, protocol=ZD_PROTO_TCP",
    "DBSockAddr": f"sa={_INET}, protocol=ZD_PROTO_TCP",
    "DNSMatcher": "hosts='localhost', server=None",
    "DNSResolver": "multi=FALSE, family=AF_INET",
    "DenyService": "name='n', logging=TRUE, ipv4_setting=DenyIPv4.DROP, ipv6_setting=DenyIPv6.DROP",
    "DirectedChainer": f"remote={_INET}, local=None, forge_addr=0",
    "DirectedRouter": f"dest_addr={_INET}, forge_addr=FALSE, overrideable=FALSE, forge_port=Z_PORT_ANY",
    "Dispatcher": f"{_BIND}, service='svc', transparent=FALSE, prio=100, backlog=255, accept_one=FALSE,"
                  " threaded=FALSE, mark_tproxy=FALSE, session_limit=5, rule_port='', proxy_protocol=()",
    "FailoverChainer": f"{_STATE}, timeout=0, round_robin=FALSE, hosts=None, local=None, forge_addr=None",
    "GeneralNAT": f"mapping=[({_NET}, {_NET}, {_NET})]",
    "HashNAT": "ip_hash={'192.0.2.1': '192.0.2.2'}, default_reject=TRUE",
    "HashResolver": "mapping={'a': '192.0.2.1'}",
    "InbandChainer": "local=None, forge_addr=0",
    "InbandRouter": "forge_addr=FALSE, forge_port=Z_PORT_ANY, permit_local_targets=FALSE",
    "Inet6Subnet": "addr='2001:db8::/32'",
    "InetDomain": "addr=None",
    "InetSubnet": "addr='10.0.0.0/8'",
    "InetZone": "name='z', addrs=(), admin_parent=None, inbound_services=None, outbound_services=None, umbrella=0",
    "LeastConnectionChainer": _STATE,
    "Listener": f"bindto={_INET}, service='svc'",
    "LockedCache": "child_cache=TimedCache('x', 5)",
    "MatcherPolicy": "name='m', matcher=RegexpMatcher(['a'])",
    "MultiTargetChainer": _MULTI,
    "NAT46": "prefix='64:ff9b::', prefix_mask=96, suffix='::'",
    "NAT64": "prefix_mask=96",
    "NATPolicy": f"name='n', nat=StaticNAT({_INET}), cacheable=TRUE",
    "NDimensionDispatcher": f"{_BIND}, rules=({{'dst_port': 443, 'service': 'svc'}},)",
    "OneToOneMultiNAT": f"mapping=[({_NET}, {_NET})], default_reject=TRUE",
    "OneToOneNAT": f"from_domain={_NET}, to_domain={_NET}, default_reject=TRUE",
    "PFService": "name='n', router=None, snat_policy=None, dnat_policy=None",
    "RandomNAT": f"addresses=[{_INET}]",
    "Receiver": f"bindto={_INET}, service='svc', rcvbuf=65536",
    "RegexpFileMatcher": "match_fname=None, ignore_fname=None",
    "RegexpMatcher": "match_list=None, ignore_list=None, ignore_case=TRUE",
    "ResolverPolicy": "name='r', resolver=DNSResolver()",
    "RoundRobinChainer": _STATE,
    "Rule": "service='svc', rule_id=None, src_zone=(), dst_zone=(), src_subnet=(), dst_subnet=(), dst_port=80,"
            " src_port=80, proto=6, iface=(), ifgroup=(), reqid=()",
    "Service": "name='n', proxy_class=PlugProxy, router=None, chainer=None, snat_policy=None, snat=None,"
               " dnat_policy=None, dnat=None, authentication_policy=None, authorization_policy=None, max_instances=0,"
               " max_sessions=0, auth_name=None, resolver_policy=None, auth=None, auth_policy=None, keepalive=None,"
               " encryption_policy=None, limit_target_zones_to=None",
    "ShiftCache": "name='c', shift_threshold=3",
    "SideStackChainer": "right_class=PlugProxy, right_chainer=None",
    "SmtpInvalidRecipientMatcher": "server_name='127.0.0.1', server_port=25, cache_timeout=60, attempt_delivery=0,"
                                   " force_delivery_attempt=0, sender_address='<>', bind_name='',"
                                   " refused_cache_timeout=0, timeout=30",
    "SockAddrInet": "ip='192.0.2.1', port=50080",
    "SockAddrInet6": "ip='::1', port=50080",
    "SockAddrInetHostname": "hostname='localhost', port=50080",
    "SockAddrInetRange": "ip='192.0.2.1', port_min=50080, port_max=50090",
    "SockAddrUnix": "path='/nonexistent'",
    "SourceIPBasedChainer": _STATE,
    "StackingProvider": "name='s', backend=RemoteStackingBackend(())",
    "StateBasedChainer": _STATE,
    "StaticNAT": f"addr={_INET}",
    "TimedCache": "name='c', timeout=5, update_stamp=TRUE, cleanup_threshold=100",
    "TransparentChainer": "local=None, forge_addr=0, forced_port=0",
    "TransparentRouter": "forced_port=0, forge_addr=FALSE, overrideable=FALSE, forge_port=Z_PORT_ANY",
    "Zone": "name='z', addrs=(), hostnames=(), admin_parent=None, inbound_services=None, outbound_services=None",
    "ZoneDispatcher": f"{_BIND}, services={{'internet': 'svc'}}, follow_parent=FALSE",
}
WRONG = (None, 5, 1.5, -1, 10**30, -10**30, float("nan"), float("inf"), True, "x", "", "\0", "é", b"b", [], (), {},
         ["x"], [None], [5], [[]], {"a": 5}, {5: 5}, {"x"}, object(), lambda: 0, int)
# what the documentation of the class names besides PolicyError and the exceptions of Zorp.Exceptions
DOCUMENTED = {"FailoverChainer": TypeError, "DBIfaceGroup": RuntimeError}

ARGUMENTS = [(name, argument) for name, call in GOOD.items()
             for argument in re.findall(r"(?:^|, ?)(\w+)=", call)]


@contextlib.contextmanager
def world():
    with policy_world() as names:
        names.update((name, getattr(Cache, name)) for name in Cache.__all__)
        names["Service"]("svc", names["PlugProxy"])
        yield names


def made(names, cls, argument, value):
    """Return the object with one argument replaced, None when the policy was refused in words."""
    keywords = {**eval(f"dict({GOOD[cls]})", names), argument: value}
    try:
        return names[cls](**keywords)
    except PolicyError as error:
        words = (error.problem, error.remedy)
    except (ZorpException, DOCUMENTED.get(cls, ZorpException)) as error:
        words = (str(error),)
    assert all(words)
    return None


@pytest.mark.parametrize("cls", GOOD)
def test_good_call_is_good(cls):
    with world() as names:
        assert eval(f"{cls}({GOOD[cls]})", names) is not None


@pytest.mark.parametrize(("cls", "argument"), ARGUMENTS)
def test_wrong_argument_is_refused_in_words_or_harmless(cls, argument):
    for value in WRONG:
        with world() as names:
            thing = made(names, cls, argument, value)
            if thing is not None:
                use(names, cls, thing)


def use(names, cls, thing):
    """Do with the object what a session, or the end of the load, would do; nothing but refusals may come of it."""
    client = names["SockAddrInet"]("10.1.2.3", 40000)
    try:
        for method, arguments in {
                "checkMatch": ("user@example.invalid",) if "Recipient" not in cls and "DNS" not in cls else None,
                "performTranslation": (None, (client, client), 0),
                "lookup": ("key",), "validateMatcher": (), "checkReferences": (), "key": (), "getProtocol": (),
                "getName": (), "contains": (client,), "clone": (0,), "format": (),
        }.items():
            if arguments is not None and callable(getattr(thing, method, None)):
                getattr(thing, method)(*arguments)
        str(thing)
    except (PolicyError, ZorpException):
        pass


LATER = [
    ("ConnectChainer", {"timeout_connect": 10**30}, "give a number of milliseconds from 0 to 2147483647"),
    ("Service", {"auth": 5}, "No such authentication policy; policy='5'"),
    ("Service", {"auth": object()}, "No such authentication policy"),
    ("Service", {"auth_policy": ["x"]}, r"No such authentication policy; policy='\['x'\]'"),
    ("SmtpInvalidRecipientMatcher", {"server_port": "25"}, "Invalid server_port of SmtpInvalidRecipientMatcher"),
    ("SmtpInvalidRecipientMatcher", {"timeout": 0}, "give a number of seconds from 0.001 to"),
    ("InbandRouter", {"permit_local_targets": "FALSE"}, "write TRUE or FALSE, without quotes"),
    ("SideStackChainer", {"right_class": object()}, "Invalid right_class"),
    ("Dispatcher", {"backlog": 1 << 31}, "Invalid backlog of a dispatcher"),
]


@pytest.mark.parametrize(("cls", "values", "text"), LATER, ids=[f"{cls}-{next(iter(v))}" for cls, v, _ in LATER])
def test_what_used_to_fail_at_the_first_client_is_said_at_load(cls, values, text):
    with world() as names, pytest.raises(PolicyError, match=text):
        names[cls](**{**eval(f"dict({GOOD[cls]})", names), **values})
