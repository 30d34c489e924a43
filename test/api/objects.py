"""Checks that need a living object: instance attributes, documented attributes, `**kw` constructors.

SAMPLES says how to make one object of each class, as the text of keyword arguments: so an
attribute that the data calls "param:x" can be compared with the argument x.  The texts are
evaluated in a policy's world (test/support/world.py) with one zone and one service.
"""

from __future__ import annotations

import ast

from test.api.walk import Check, Differs, _equal, member, module_of
from test.support import api
from test.support.tree import ROOT
from test.support.world import policy_world

_BIND = "bindto=DBSockAddr(SockAddrInet('127.0.0.1', 0), ZD_PROTO_TCP)"
_UDP = "bindto=DBSockAddr(SockAddrInet('127.0.0.1', 0), ZD_PROTO_UDP)"
_TABLE = "services={('internet', 'internet'): 'svc'}"

SAMPLES = {
    "Base.BaseZone": "name='z', addrs=('10.0.0.0/8',), hostnames=()",
    "Cache.AbstractCache": "name='c'",
    "Cache.LockedCache": "child_cache=TimedCache('c', 5)",
    "Cache.ShiftCache": "name='c', shift_threshold=3",
    "Cache.TimedCache": "name='c', timeout=5, update_stamp=FALSE, cleanup_threshold=7",
    "Chainer.AbstractChainer": "protocol=ZD_PROTO_TCP",
    "Chainer.ConnectChainer": "protocol=ZD_PROTO_UDP, timeout_connect=100",
    "Chainer.FailoverChainer": "round_robin=TRUE",
    "Chainer.MultiTargetChainer": "",
    "Chainer.RoundRobinChainer": "",
    "Chainer.SideStackChainer": "right_class=PlugProxy, right_chainer=ConnectChainer()",
    "Chainer.StateBasedChainer": "timeout_state=1000",
    "Common.LogFilter": "verbosity=3, logspec=''",
    "Common.LogSpecItem": "logspec_item='core.*:5'",
    "Common.Logger": "",
    "Dispatch.AbstractDispatch": f"session_id='dsp/dispatch:0', {_BIND}",
    "Dispatch.BaseDispatch": f"session_id='dsp/dispatch:0', {_BIND}",
    "Dispatch.CSZoneDispatcher": f"{_BIND}, {_TABLE}",
    "Dispatch.Dispatcher": f"{_BIND}, service='svc'",
    "Dispatch.NDimensionDispatcher": f"{_BIND}, rules=({{'dst_port': 443, 'service': 'svc'}},)",
    "Dispatch.RuleDispatcher": "",
    "Dispatch.ZoneDispatcher": f"{_BIND}, services={{'internet': 'svc'}}",
    "Domain.AbstractDomain": "",
    "Domain.Inet6Domain": "addr='2001:db8::/32'",
    "Domain.InetDomain": "addr='10.0.0.0/8'",
    "FileLock.FileLock": "filename='/nonexistent/lock'",
    "Instance.Instance": "name='main', zorp_argv='-p /etc/zorp/policy.py', process_num=0",
    "Instance.ZorpProcess": "zorp_argv='-p /etc/zorp/policy.py'",
    "InstancesConf.InstancesConf": "directory=INSTALLED",
    "Listener.CSZoneListener": f"{_BIND}, {_TABLE}",
    "Listener.Listener": f"{_BIND}, service='svc'",
    "Listener.ZoneListener": f"{_BIND}, services={{'internet': 'svc'}}",
    "Matcher.AbstractMatcher": "",
    "Matcher.CombineMatcher": "expr=(Z_NOT, RegexpMatcher(['a']))",
    "Matcher.DNSMatcher": "hosts=('localhost',), server=None",
    "Matcher.MatcherPolicy": "name='m', matcher=RegexpMatcher(['a'])",
    "Matcher.RegexpFileMatcher": "",
    "Matcher.RegexpMatcher": "match_list=[], ignore_list=[], ignore_case=FALSE",
    "Matcher.SmtpInvalidRecipientMatcher": "server_name='127.0.0.1', server_port=26, force_delivery_attempt=TRUE,"
                                           " sender_address='a@b', bind_name='h'",
    "Matcher.SmtpProto": "bind_addr='127.0.0.1'",
    "NAT.GeneralNAT": "mapping=[(InetSubnet('10.0.0.0/8'), InetSubnet('0.0.0.0/0'), InetSubnet('192.0.2.0/24'))]",
    "NAT.HashNAT": "ip_hash={'10.0.0.1': '10.0.0.2'}, default_reject=FALSE",
    "NAT.NAT46": "prefix_mask=96",
    "NAT.NAT64": "prefix_mask=64",
    "NAT.NATPolicy": "name='n', nat=ForgeClientSourceNAT(), cacheable=FALSE",
    "NAT.OneToOneMultiNAT": "mapping=[(InetSubnet('10.0.0.0/24'), InetSubnet('10.0.1.0/24'))], default_reject=FALSE",
    "NAT.OneToOneNAT": "from_domain=InetSubnet('10.0.0.0/24'), to_domain=InetSubnet('10.0.1.0/24'),"
                       " default_reject=FALSE",
    "NAT.RandomNAT": "addresses=(SockAddrInet('192.0.2.1', 0),)",
    "NAT.StaticNAT": "addr=SockAddrInet('192.0.2.1', 0)",
    "Receiver.CSZoneReceiver": f"{_UDP}, {_TABLE}",
    "Receiver.Receiver": f"{_UDP}, service='svc'",
    "Receiver.ZoneReceiver": f"{_UDP}, services={{'internet': 'svc'}}",
    "Resolver.AbstractResolver": "",
    "Resolver.DNSResolver": "multi=TRUE, family=AF_INET6",
    "Resolver.HashResolver": "mapping={'h': ('192.0.2.1',)}",
    "Resolver.ResolverPolicy": "name='r', resolver=DNSResolver()",
    "ResolverCache.AbstractResolver": "timeout=2",
    "ResolverCache.DNSResolver": "server='192.0.2.1'",
    "ResolverCache.ResolverCache": "resolver=module.DNSResolver()",
    "Router.AbstractRouter": "forge_addr=TRUE, forge_port=Z_PORT_GROUP",
    "Router.DirectedRouter": "dest_addr=SockAddrInet('192.0.2.1', 80), overrideable=TRUE",
    "Router.InbandRouter": "",
    "Router.TransparentRouter": "forced_port=8080, overrideable=TRUE",
    "Rule.PortRange": "low=1, high=2",
    "Rule.Rule": "service='svc', rule_id=77",
    "Rule.RuleSet": "",
    "Service.AbstractService": "name='s'",
    "Service.DenyService": "name='s', logging=FALSE, ipv4_setting=DenyIPv4.TCP_RESET, ipv6_setting=DenyIPv6.TCP_RESET",
    "Service.PFService": "name='s', router=TransparentRouter()",
    "Service.Service": "name='s', proxy_class=PlugProxy, max_instances=3, max_sessions=4, keepalive=Z_KEEPALIVE_BOTH,"
                       " limit_target_zones_to=('internet',), router=TransparentRouter(), chainer=ConnectChainer()",
    "Session.AbstractSession": "",
    "Session.ClientInfo": "client_stream=None, client_local=SockAddrInet('127.0.0.1', 1), client_listen=None,"
                          " client_address=SockAddrInet('127.0.0.1', 2)",
    "Session.MasterSession": "",
    "Session.StackedSession": "owner=module.MasterSession(), chainer=None",
    "SockAddr.SockAddrInet": "ip='192.0.2.1', port=80",
    "SockAddr.SockAddrInet6": "ip='2001:db8::1', port=80",
    "SockAddr.SockAddrInetHostname": "hostname='127.0.0.1', port=80",
    "SockAddr.SockAddrInetRange": "ip='192.0.2.1', port_min=80, port_max=90",
    "SockAddr.SockAddrUnix": "path='/nonexistent/socket'",
    "Stack.AbstractStackingBackend": "",
    "Stack.RemoteStackingBackend": "addrs=(SockAddrInet('192.0.2.1', 80),)",
    "Stack.StackingProvider": "name='p', backend=RemoteStackingBackend(SockAddrInet('192.0.2.1', 80))",
    "Stream.Stream": "fd=streamPair(1, 1)[0].sock.detach(), name='s'",
    "Subnet.Inet6Subnet": "addr='2001:db8::/32'",
    "Subnet.InetDomain": "addr='10.0.0.0/8'",
    "Subnet.InetSubnet": "addr='10.0.0.0/8'",
    "Zone.AbstractZone": "name='a', umbrella=1",
    "Zone.RootZone": "name='root'",
    "Zone.InetRootZone": "name='root'",
    "Zone.Zone": "name='z', addrs=('10.0.0.0/8',)",
    "Zorp.ConnectionVerdict": "verdict_value=2",
}

# What a rule may be given: one value of each dimension, as console files and examples write it.
_RULE_VALUES = {
    "rule_id": "7", "service": "'svc'", "reqid": "1", "iface": "'lo'", "ifgroup": "100", "proto": "6",
    "proto_type": "8", "proto_subtype": "0", "src_port": "1024", "dst_port": "PortRange(80, 90)",
    "src_subnet": "'10.0.0.0/8'", "src_zone": "'internet'", "dst_subnet": "('10.0.0.0/8', '2001:db8::/32')",
    "dst_iface": "'lo'", "dst_ifgroup": "100", "dst_zone": "('internet',)", "src_iface": "'lo'", "src_ifgroup": "100",
    "icmp_type": "8", "icmp_code": "0",
    "detect": "[('http', 'svc')]",
}
_RULE_PROTOCOL = {"proto_type": 1, "proto_subtype": 1, "icmp_type": 1, "icmp_code": 1, "src_port": 6, "dst_port": 6}
# Keywords of dispatchers that have no meaning for the protocol of the class: TypeError, as ever.
_NOT_FOR = {"Listener": {"rcvbuf"}, "Receiver": {"accept_one", "backlog"}}
_KEYWORD_VALUES = {
    "session_limit": 10, "client_zone": None, "server_zone": None, "rule_id": 7, "server_address": None,
    "target_address": (), "target_local": None, "target_zone": (),
}
# What a dispatcher gives a MasterSession of 6.0 and later, before its keywords.
_ACCEPTED = ("service=Service('other', PlugProxy), client_stream=None, client_local=SockAddrInet('127.0.0.1', 1),"
             " client_listen=DBSockAddr(SockAddrInet('127.0.0.1', 1), ZD_PROTO_TCP),"
             " client_address=SockAddrInet('127.0.0.1', 2)")

# Attributes that the constructor itself fills: there, whatever the first value was.
_FILLED = {
    "Dispatch.AbstractDispatch.protocol", "Dispatch.AbstractDispatch.session_id",
    "Dispatch.AbstractDispatch.dispatches", "Dispatch.BaseDispatch.dispatches", "Dispatch.Dispatcher.protocol",
    "Dispatch.RuleDispatcher.bindto",
    "Matcher.CombineMatcher.arg", "Matcher.DNSMatcher.cache_name_to_addresses", "Matcher.DNSMatcher.expires",
    "Session.ClientInfo.client_zone", "Zone.InetRootZone.zones",
}

# Native objects that are no policy class: how a test gets one.
NATIVE = {
    "Attach": "Attach(proxy(names), ZD_PROTO_TCP, None, SockAddrInet('127.0.0.1', 1))",
    "Dispatch": "names['Dispatch']('test', DBSockAddr(SockAddrInet('127.0.0.1', 0), ZD_PROTO_TCP),"
                " ZD_PRI_LISTEN, lambda *args: None, {})",
    "DBSockAddr": "DBSockAddr(SockAddrInet('127.0.0.1', 80), ZD_PROTO_TCP)",
    "DBIface": "DBIface('lo', 80, protocol=ZD_PROTO_TCP)",
    "DBIfaceGroup": "DBIfaceGroup(1, 80, protocol=ZD_PROTO_TCP)",
    "ProxyGroup": "ProxyGroup(1)",
}


def build(module, name, names):
    """Return (an object of the class, its arguments), made as SAMPLES says."""
    scope = _scope(module, names)
    if f"{module}.{name}" in SAMPLES:
        arguments = eval(f"dict({SAMPLES[f'{module}.{name}']})", scope)
    elif module in ("Exceptions", "Zorp") and name.endswith("Exception"):
        arguments = {"detail": "d"}
    else:
        arguments = {}
    return member(module, name)(**arguments), arguments


def _scope(module, names):
    """What the texts of SAMPLES and NATIVE may name."""
    scope = {}
    for source in ("Cache", "Dispatch", "Session", module):
        scope.update(vars(module_of(source)))
    return {**scope, **names, "module": module_of(module), "names": names, "proxy": _proxy,
            "INSTALLED": str(ROOT / "etc" / "zorp")}


def _proxy(names):
    """A proxy that has not started; for natives that want one."""
    session = module_of("Session")
    master = session.MasterSession()
    master.client_stream = names["streamPair"](1, 1)[0]
    stacked = session.StackedSession(master)
    stacked.client_stream = master.client_stream
    return names["PlugProxy"](stacked)


def checks(module):
    """Yield the checks of instance and documented attributes, keywords and native objects."""
    facts = api.load(module)
    for name, entry in facts.get("classes", {}).items():
        if entry.get("kind") == "proxy":
            continue
        for attribute, variants in entry.get("instance_attributes", {}).items():
            variant = api.newest(variants)
            yield Check(module, "object", f"{name}().{attribute}",
                        lambda name=name, attribute=attribute, variant=variant:
                        _instance_value(module, name, attribute, variant))
        for attribute in entry.get("attributes", {}):
            if attribute not in entry.get("instance_attributes", {}):
                yield Check(module, "object", f"{name}().{attribute}",
                            lambda name=name, attribute=attribute: _instance_has(module, name, attribute))
        for key in sorted({item[0]: item for variant in entry.get("keywords", ()) for item in variant["keys"]}):
            yield Check(module, "form", f"{name}({key}=)",
                        lambda name=name, key=key, entry=entry: _accepts_keyword(module, name, key, entry))
    yield from _native_checks(module, facts)
    for key in facts.get("rejected_keywords", ()):
        yield Check(module, "form", f"Rule rejects {key}", lambda key=key: _rule_rejects(key))


def _world():
    return policy_world()


def _prepared(names):
    names["Service"]("svc", names["PlugProxy"])


def _instance_value(module, name, attribute, variant):
    with _world() as names:
        _prepared(names)
        sample, arguments = build(module, name, names)
        value = getattr(sample, attribute)
        source = variant.get("from", "")
        if source.startswith("param:") and source[6:] in arguments:
            expected = arguments[source[6:]]
        elif "value" in variant and f"{module}.{name}.{attribute}" not in _FILLED:
            expected = variant["value"]
        else:
            return
        if expected in ({}, [], ()):
            if value is None or len(value):
                raise Differs(f"{attribute} is {value!r}, was {expected!r}")
        elif not _equal(value, expected):
            raise Differs(f"{attribute} is {value!r}, was {expected!r}")


def _instance_has(module, name, attribute):
    with _world() as names:
        _prepared(names)
        sample, arguments = build(module, name, names)
        if attribute not in arguments:            # a documented argument is no attribute by that alone
            getattr(sample, attribute)


def _accepts_keyword(module, name, key, entry):
    if name == "Rule":
        _accepts_dimension(key)
        return
    with _world() as names:
        _prepared(names)
        sample = _ACCEPTED if name == "MasterSession" else SAMPLES[f"{module}.{name}"]
        if key == "rcvbuf" and module == "Dispatch":
            sample = sample.replace(_BIND, _UDP)
        arguments = eval(f"dict({sample})", _scope(module, names))
        items = {item[0]: item for variant in entry["keywords"] for item in variant["keys"]}
        arguments[key] = _keyword_value(items[key])
        if key not in _NOT_FOR.get(module, ()):
            member(module, name)(**arguments)
            return
        try:
            member(module, name)(**arguments)
        except TypeError:
            return
        raise Differs(f"{key} was an error for this protocol and is accepted now")


def _keyword_value(item):
    if item[0] in _KEYWORD_VALUES:
        return _KEYWORD_VALUES[item[0]]
    return item[2] if len(item) == 3 else ast.literal_eval(item[1])


def _accepts_dimension(key):
    with _world() as names:
        _prepared(names)
        arguments = {"service": "svc", key: eval(_RULE_VALUES[key], dict(names))}
        if key in _RULE_PROTOCOL:
            arguments["proto"] = _RULE_PROTOCOL[key]
        names["Rule"](**arguments)


def _rule_rejects(key):
    with _world() as names:
        _prepared(names)
        try:
            names["Rule"](service="svc", **{key: "2001:db8::/32"})
        except Exception:
            return
        raise Differs(f"{key} was an error and is accepted now")


# ---------------------------------------------------------------------------------- native objects

def _native_checks(module, facts):
    for name, entry in facts.get("core_objects", {}).items():
        for attribute, access in entry.get("attributes", {}).items():
            for sample in _native_samples(module, name, access):
                yield Check(module, "object", f"{sample}.{attribute} {access['access']}",
                            lambda name=name, sample=sample, attribute=attribute, access=access:
                            _native_attribute(module, name, sample, attribute, access))
        if "str_form" in entry:
            yield Check(module, "object", f"str({name})",
                        lambda name=name, form=entry["str_form"]: _has_text(module, name, form))


def _native_samples(module, name, access):
    if name == "DispatchBind":
        return [sample.strip() for sample in access.get("only", "DBSockAddr, DBIface, DBIfaceGroup").split(",")]
    return [name]


def _native(module, name, names):
    if f"{module}.{name}" in SAMPLES:
        return build(module, name, names)[0]
    if name not in NATIVE:
        raise Differs(f"no way to make a {name}")
    return eval(NATIVE[name], _scope(module, names))


def _native_attribute(module, name, sample, attribute, access):
    with _world() as names:
        _prepared(names)
        thing = _native(module, sample, names)
        if name == "Stream" and attribute in ("split", "nul_nonfatal"):
            thing.push_lines(100)
        value = getattr(thing, attribute)
        if "method" in access["type"]:
            if not callable(value):
                raise Differs(f"{attribute} is no method")
        elif access["access"] == "rw":
            setattr(thing, attribute, value)
            if not _equal(getattr(thing, attribute), value):
                raise Differs(f"{attribute} does not keep what is written")


def _has_text(module, name, form):
    with _world() as names:
        thing = _native(module, name, names)
        fields = {"<ip>": "ip_s", "<port>": "port", "<path>": "path"}
        for mark, attribute in fields.items():
            if mark in form:
                form = form.replace(mark, str(getattr(thing, attribute)))
        if str(thing) != form:
            raise Differs(f"str() is {thing!s}, was {form}")

