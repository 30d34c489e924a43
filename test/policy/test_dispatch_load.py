"""Dispatchers at load time: what is refused, what is said once, and the small conversions."""

import re
import socket

import pytest

from Zorp.Exceptions import ServiceException


@pytest.fixture
def gateway(dispatching):
    return dispatching


REFUSED = {
    "undefined service": ('Listener(SockAddrInet("127.0.0.1", 1), "nosuch")',
                          ServiceException, "Service: Service nosuch not found; give the dispatcher the name of a "
                                            "service that is defined above it; there are: a"),
    "misspelt service": ("service('plug9')\n    Listener(SockAddrInet('127.0.0.1', 1), 'plug8')",
                         ServiceException, "Service plug8 not found; give the dispatcher the name of a service that is "
                                           "defined above it; did you mean 'plug9'"),
    "mixed protocols": (
        'Dispatcher([DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_TCP),'
        ' DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_UDP)], "a")',
        ValueError, "Inconsistent protocol specified in dispatch addresses"),
    "no protocol": ('Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", 1)), "a")',
                    ValueError, "No preferred protocol is specified"),
    "no bind": ('Dispatcher(service="a")', ValueError, "bindto is required argument and must be a sequence"),
    "empty bind": ('Dispatcher([], "a")', ValueError, "bindto is required argument and must be a sequence"),
    "no address": ('Listener("127.0.0.1", "a")', ValueError, "Expected SockAddr"),
    "protocol of a listener": ('Listener(DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_UDP), "a")',
                               ValueError, "Protocol number mismatch (2 != 1)"),
    "unknown keyword": ('Listener(SockAddrInet("127.0.0.1", 1), "a", transparant=TRUE)', TypeError, "transparant"),
    "UDP keyword": ('Listener(SockAddrInet("127.0.0.1", 1), "a", rcvbuf=1)', TypeError, "rcvbuf"),
    "follow_parent without zones": ('Listener(SockAddrInet("127.0.0.1", 1), "a", follow_parent=TRUE)',
                                    TypeError, "follow_parent"),
    "bad rule port": ('Listener(SockAddrInet("127.0.0.1", 1), "a", rule_port="80-90")',
                      ValueError, "Invalid port range: '80-90'"),
    "no table": ('ZoneListener(SockAddrInet("127.0.0.1", 1), "a")', ValueError, "services must be a mapping"),
    "unknown service in a table": ('ZoneListener(SockAddrInet("127.0.0.1", 1), {"*": "nosuch"})',
                                   ValueError, "No such service; service='nosuch', dispatcher='policy.py:"),
    "unknown zone in a table": ('ZoneListener(SockAddrInet("127.0.0.1", 1), {"ofice": "a", "*": "a"})',
                                ValueError, "No such zone; zone='ofice', dispatcher='policy.py:"),
    "unknown client zone": ('CSZoneListener(SockAddrInet("127.0.0.1", 1), {("badd", "*"): "a", ("*", "*"): "a"})',
                            ValueError, "No such zone; zone='badd', dispatcher='policy.py:"),
    "unknown server zone": ('CSZoneListener(SockAddrInet("127.0.0.1", 1), {("*", "dmzz"): "a"})',
                            ValueError, "No such zone; zone='dmzz', dispatcher='policy.py:"),
    "one zone for two": ('CSZoneListener(SockAddrInet("127.0.0.1", 1), {"office": "a"})',
                         ValueError, "Not a pair of zones; key='office'"),
    "keyword of TCP for a receiver": ('ZoneReceiver(SockAddrInet("127.0.0.1", 1), {"*": "a"}, backlog=1)',
                                      TypeError, "backlog"),
    "protocol of a receiver": ('Receiver(DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_TCP), "a")',
                               ValueError, "Protocol number mismatch (1 != 2)"),
}


@pytest.mark.parametrize(("declaration", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_at_load(gateway, declaration, kind, text):
    with pytest.raises(kind) as refused:
        gateway(f"def gateway():\n    service('a')\n    {declaration}\n")
    assert text in str(refused.value)


@pytest.mark.parametrize("declaration", ['Dispatcher(SockAddrInet("127.0.0.1", 1), "a")',
                                         'ZoneListener(SockAddrInet("127.0.0.1", 1), {})'])
def test_dispatchers_belong_into_instance_functions(gateway, monkeypatch, declaration):
    with pytest.raises(RuntimeError, match="Parsing phase has not completed yet, Dispatcher must be defined"):
        gateway(f"Globals.parsing = False\nservice('a')\n{declaration}\n")


def test_deprecated_classes_are_named_once(gateway):
    import Zorp.Dispatch
    import Zorp.Listener
    for cls in (Zorp.Listener.Listener, Zorp.Dispatch.ZoneDispatcher):
        cls.deprecated_warning = True
    running = gateway("""
def gateway():
    service("a")
    for port in (1, 2):
        Listener(SockAddrInet("127.0.0.1", port), "a")
        ZoneDispatcher(DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP), {"*": "a"})
""")
    texts = running.logged.texts("core.debug")
    for text in ("Use of Listener class is deprecated, Dispatcher should be used instead.",
                 "Use of ZoneDispatcher class is deprecated, Rule should be used instead."):
        assert len([line for line in texts if re.fullmatch(re.escape(text) + r"; place='\S+:\d+'", line)]) == 1


def test_a_complaint_about_a_table_says_where_its_dispatcher_stands(gateway):
    with pytest.raises(ValueError, match="No such zone") as refused:
        gateway("""
def gateway():
    service("a")
    ZoneListener(SockAddrInet("127.0.0.1", 1), {"nosuch": "a"})
""")
    assert refused.value.place.startswith("policy.py:")


def test_zones_defined_later_hidden_ones_and_any_may_stand_in_tables(gateway):
    # given a classic zone of two nets, which makes hidden zones, and one that is defined after the dispatcher
    running = gateway("""
InetZone("old", ["10.8.0.0/16", "10.9.0.0/16"], inbound_services=["*"], outbound_services=["*"])

def gateway():
    service("a")
    ZoneListener(SockAddrInet("127.0.0.1", 1), {"old": "a", "old-#0": "a", "late": "a", "*": "a"})
    CSZoneListener(SockAddrInet("127.0.0.1", 2), {("lab", "*"): "a", ("*", "late"): "a"})
    Zone("late", "10.10.0.0/16")
""")
    # then the policy is loaded
    assert len(running.chains) == 2


def test_a_site_that_chooses_itself_has_its_own_keys(gateway):
    running = gateway("""
class ByHour(ZoneDispatcher):
    def getService(self, session):
        return Globals.services[self.services["night"]]

def gateway():
    service("a")
    ByHour(DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_TCP), {"night": "a"})
""")
    assert len(running.chains) == 1


def test_receivers_serve_udp(gateway):
    running = gateway("""
def gateway():
    service("a")
    Receiver(SockAddrInet("127.0.0.1", 1), "a", rcvbuf=1000, session_limit=10)
    ZoneReceiver(SockAddrInet("127.0.0.1", 2), {"*": "a"})
    CSZoneReceiver(SockAddrInet("127.0.0.1", 3), {("*", "*"): "a"})
""")
    assert [chain.protocol for chain in running.chains] == [2, 2, 2]
    assert running.chains[0].params.rcvbuf_bytes == 1000


def test_protocol_numbers():
    from Zorp.Dispatch import convertDBProtoToIPProto, convertIPProtoToDBProto
    assert [convertDBProtoToIPProto(1), convertDBProtoToIPProto(2)] == [socket.IPPROTO_TCP, socket.IPPROTO_UDP]
    assert [convertIPProtoToDBProto(6), convertIPProtoToDBProto(17)] == [1, 2]
    with pytest.raises(ValueError, match="Unknown dispatch bind protocol"):
        convertDBProtoToIPProto(0)
    with pytest.raises(ValueError, match="IP protocol not representable in DBProto; protocol='1'"):
        convertIPProtoToDBProto(1)


@pytest.mark.parametrize(("text", "ports"), [(80, [(80, 80)]), ("80", [(80, 80)]), ("", []), (" 80 , 443", [(80, 80),
                         (443, 443)]), ("1024:2048,8080", [(1024, 2048), (8080, 8080)])])
def test_port_lists(text, ports):
    from Zorp.Dispatch import parsePortString
    assert parsePortString(text) == ports


@pytest.mark.parametrize("text", ["a", "80-90", "2:1", "70000", "80,,90", "-1", ":80"])
def test_bad_port_lists(text):
    from Zorp.Dispatch import parsePortString
    with pytest.raises(ValueError, match="Invalid port range: '"):
        parsePortString(text)
