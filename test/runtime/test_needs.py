"""Which rights a policy keeps: those that it uses, and no others."""

import pathlib

import pytest

HEAD = '''
from Zorp.Core import *
from Zorp.Plug import *

class Marking(PlugProxy):
    def config(self):
        PlugProxy.config(self)
        self.server_socket_mark = 5

class OwnRouter(DirectedRouter): pass

NATPolicy("snat", StaticNAT(addr=SockAddrInet("127.0.0.1", 0)))
there = SockAddrInet("127.0.0.1", 1)

def intra():
    Service("s", PROXY, ROUTER)
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="s"DISPATCH)
'''

POLICIES = {
    "plain": ({}, False),
    "forged address": ({"ROUTER": "router=DirectedRouter(there, forge_addr=TRUE)"}, True),
    "forged port": ({"ROUTER": "router=DirectedRouter(there, forge_port=Z_PORT_EXACT)"}, True),
    "translated source": ({"ROUTER": "router=DirectedRouter(there), snat_policy='snat'"}, True),
    "own router": ({"ROUTER": "router=OwnRouter(there)"}, True),
    "failover": ({"ROUTER": "router=DirectedRouter((there, there)), chainer=FailoverChainer()"}, False),
    "transparent listener": ({"DISPATCH": ", transparent=TRUE"}, True),
    "low port over UDP": ({"$port), ZD_PROTO_TCP": "1019), ZD_PROTO_UDP"}, True),
    "high port over UDP": ({"ZD_PROTO_TCP": "ZD_PROTO_UDP"}, False),
    "marks": ({"PROXY": "Marking"}, True),
}


@pytest.mark.parametrize(("changes", "kept"), POLICIES.values(), ids=POLICIES)
def test_rights_of_a_policy(zorp, changes, kept):
    # given a policy of one kind; when it is loaded
    policy = HEAD
    for old, new in changes.items():
        policy = policy.replace(old, new)
    for name, default in (("PROXY", "PlugProxy"), ("ROUTER", "router=DirectedRouter(there)"), ("DISPATCH", "")):
        policy = policy.replace(name, default)
    daemon = zorp(policy)
    # then it has rights only if it needs some, and never more than its master
    status = [pathlib.Path(f"/proc/{pid}/status").read_text() for pid in (daemon.worker_pid(), daemon.pid)]
    worker, master = (int(text.split("CapPrm:")[1].split()[0], 16) for text in status)
    assert worker == (master if kept else 0)
