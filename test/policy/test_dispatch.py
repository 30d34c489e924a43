"""From an accepted connection to a running proxy: selection, limits, refusals, the log of one connection."""

import gc
import threading
import time

import pytest

from Zorp.Szig import statistics

from test.support.gateway import Gateway, ended, exchange

LISTENER = """
def gateway():
    service("plug")
    Listener(SockAddrInet("127.0.0.1", 5001), "plug")
"""


CHILD_ZONE = """
Zone("child", "127.1.0.0/16", admin_parent="local")
"""


@pytest.fixture
def gateway(dispatching):
    return dispatching


@pytest.fixture
def server(echo_server):
    return echo_server


def verdicts(gateway):
    return [message.text.partition("verdict='")[2].partition("'")[0]
            for message in gateway.logged.find("Connection summary")]


# ------------------------------------------------------------------ one connection

ORDER = ["Incoming connection", "Connection accepted", "Starting service", "Starting proxy instance", "Proxy starting",
         "Server connection established", "Proxy destroy", "Proxy ending", "Connection summary",
         "Ending proxy instance"]


@pytest.mark.parametrize("listener", [
    'Listener(SockAddrInet("127.0.0.1", 5001), "plug")',
    'Listener([SockAddrInet("127.0.0.1", 5001)], service="plug")',
    'Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", 5001), ZD_PROTO_TCP), "plug")',
    'Dispatcher(SockAddrInet("127.0.0.1", 5001), "plug")',
    'Listener(DBSockAddr(SockAddrInet("127.0.0.1", 5001)), SERVICE)',
    'ZoneListener(SockAddrInet("127.0.0.1", 5001), {"*": "plug"})',
    'CSZoneListener(SockAddrInet("127.0.0.1", 5001), {("*", "*"): "plug"})',
])
def test_served_connection_logs_in_order(gateway, listener):
    # given a listener in any of its forms
    running = gateway(f"def gateway():\n    SERVICE = service('plug')\n    {listener}\n")
    # when a client talks to the server and leaves
    client = running.connect()
    assert exchange(client) == b"ping"
    client.close()
    running.logged.wait_for("Ending proxy instance")
    # then the log tells it in this order
    session = running.logged.find("Starting proxy instance")[-1].session
    found = [text for message in running.logged.messages for text in ORDER if message.text.startswith(text)
             and (text in ORDER[:2] or message.session == session or message.session.startswith(f"{session}/"))]
    assert found == ORDER
    assert running.logged.has("Starting service; name='%s'", ("plug",))
    assert verdicts(running) == ["ACCEPTED"]


def test_start_line_names_the_client(gateway):
    running = gateway(LISTENER.replace("plug", "start line"))
    client = running.connect()
    message = running.logged.wait_for("Starting proxy instance")
    host, port = client.getsockname()
    assert message.session == "svc/gateway/start<20>line:0"
    assert (message.tag, message.level) == ("core.session", 3)
    assert message.text.partition(", ")[2] == (
        f"client_address='AF_INET({host}:{port})', client_zone='Zone(local)', "
        "client_local='AF_INET(127.0.0.1:5001)', client_protocol='TCP'")


def test_instance_numbers_count_per_service(gateway):
    running = gateway("""
def gateway():
    service("n-one"), service("n-two")
    Listener(SockAddrInet("127.0.0.1", 5001), "n-one")
    Listener(SockAddrInet("127.0.0.1", 5002), "n-two")
""")
    for chain in (0, 0, 1, 0):
        running.connect(chain=chain).close()
    running.logged.wait_for("Ending proxy instance", 4)
    numbers = sorted(message.session for message in running.logged.find("Starting proxy instance"))
    assert numbers == ["svc/gateway/n-one:0", "svc/gateway/n-one:1", "svc/gateway/n-one:2", "svc/gateway/n-two:0"]


def test_session_of_the_top_proxy(gateway):
    # given a proxy that looks around
    running = gateway("""
class Plug(PlugProxy):
    def config(self):
        session = self.session
        SEEN.update(stacked=type(session).__name__, master=type(session.owner).__name__, top=session.owner is
                    session.getMasterSession(), proxy=session.plug is self, listen=session.client_listen.format(),
                    missing=hasattr(session, "nosuch"), stream=session.client_stream.name)

    def shutdown(self):
        SEEN.update(server=str(self.session.server_address), local=str(self.session.client_local))
""" + LISTENER)
    client = running.connect(to=("203.0.113.80", 80))
    assert exchange(client) == b"ping"
    client.close()
    running.logged.wait_for("Ending proxy instance")
    number = running.logged.find("Starting proxy instance")[0].session
    assert running.seen == {
        "stacked": "StackedSession", "master": "MasterSession", "top": True, "proxy": True,
        "listen": "SA(proto=1,addr=AF_INET(127.0.0.1:5001))", "missing": False, "stream": f"{number}/plug/client",
        "server": f"AF_INET(127.0.0.1:{running.service('plug').router.dest_addr[0].port})",
        "local": "AF_INET(203.0.113.80:80)"}


# ------------------------------------------------------------------ limits

def test_client_over_the_limit_is_closed_and_the_next_is_served(gateway):
    # given a service for one connection at a time, and a client that holds it
    running = gateway(LISTENER.replace('service("plug")', 'service("plug", max_instances=1)'))
    first = running.connect()
    assert exchange(first) == b"ping"
    # when a second client connects
    second = running.connect()
    # then it is closed without a byte, and the log says why
    assert ended(second)
    running.logged.wait_for("Connection denied by policy")
    assert running.logged.has("Connection over permitted limits; info='%s'", ("Limit error: Instance limit reached",))
    assert verdicts(running) == ["DENIED_BY_LIMIT"]
    # and after the first has left, a third is served
    first.close()
    running.logged.wait_for("Ending proxy instance")
    assert exchange(running.connect()) == b"ping"


def test_parallel_clients_never_exceed_the_limit(gateway, server):
    # given fifty clients at once and ten instances
    running = gateway(LISTENER.replace('service("plug")', 'service("plug", max_instances=10)'))
    clients, barrier = [], threading.Barrier(50)

    def connect():
        barrier.wait()
        clients.append(running.connect())
    threads = [threading.Thread(target=connect) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.logged.wait_for("Connection over permitted limits", 40)
    # then ten are served
    assert running.service("plug").num_instances == 10
    assert len(server.wait_for_peers(10)) == 10
    for client in clients:
        client.close()
    running.logged.wait_for("Ending proxy instance", 10)
    assert running.service("plug").num_instances == 0


def test_every_started_session_ends_once(gateway):
    running = gateway(LISTENER)
    for _ in range(40):
        client = running.connect()
        assert exchange(client) == b"ping"
        client.close()
    running.logged.wait_for("Ending proxy instance", 40)
    for text in ("Starting proxy instance", "Ending proxy instance", "Connection summary"):
        assert len(running.logged.find(text)) == 40
    assert running.service("plug").num_instances == 0
    assert statistics.value(("service", "plug", "sessions_running")) == "0"
    assert statistics.children(("conns", "plug")) == []


def test_connections_per_client_are_limited(gateway, monkeypatch):
    running = gateway(LISTENER)
    monkeypatch.setattr(running.names["config"].options, "max_connections_per_client", 2)
    held = [running.connect() for _ in range(2)]
    assert all(exchange(client) == b"ping" for client in held)
    # when a third connection comes from the same address, it is closed and counted as over the limit
    assert ended(running.connect())
    assert running.logged.wait_for("Too many connections, refusing; client_address='AF_INET(127.0.0.1:")
    running.logged.wait_for("Connection summary")
    assert verdicts(running) == ["DENIED_BY_LIMIT"]
    # while another client is served, and the first again when one of its connections is gone
    assert exchange(running.connect(source="127.0.0.7")) == b"ping"
    held[0].close()
    running.logged.wait_for("Ending proxy instance")
    assert exchange(running.connect()) == b"ping"


def test_connections_of_a_zone_are_limited(gateway, monkeypatch):
    # given a zone with two clients, its child with another, and two sessions permitted to each
    running = gateway(CHILD_ZONE + LISTENER)
    monkeypatch.setattr(running.names["config"].options, "max_connections_per_zone", 2)
    held = [running.connect(source=f"127.0.0.{host}") for host in (2, 3)]
    assert all(exchange(client) == b"ping" for client in held)
    # when a third connection comes from the zone, it is closed and counted as over the limit
    assert ended(running.connect(source="127.0.0.2"))
    running.logged.wait_for("Connection summary")
    assert "of='zone local', max_connections='2'" in running.logged.find("Too many connections, refusing")[0].text
    assert verdicts(running) == ["DENIED_BY_LIMIT"]
    # while the child is served, and the zone again when one of its sessions is gone
    assert exchange(running.connect(source="127.1.0.9")) == b"ping"
    held[0].close()
    running.logged.wait_for("Ending proxy instance")
    assert exchange(running.connect(source="127.0.0.3")) == b"ping"


# ------------------------------------------------------------------ refusals

def test_forbidden_server_zone_gets_no_packet(gateway, server):
    running = gateway(LISTENER.replace('service("plug")', 'service("plug", limit_target_zones_to=["office"])'))
    assert ended(running.connect())
    running.logged.wait_for("Ending proxy instance")
    assert running.logged.find("Outbound connection not permitted; service='plug'")
    assert running.logged.find("DAC policy violation; info='DAC policy violation: Server connection is not permitted'")
    assert verdicts(running) == ["DENIED_BY_POLICY"]
    assert "server_zone='local'" in running.logged.find("Connection summary")[0].text
    assert server.peers == []


def test_dead_server(gateway, server):
    running = gateway(LISTENER)
    server.close()
    assert ended(running.connect())
    running.logged.wait_for("Ending proxy instance")
    assert verdicts(running) == ["DENIED_BY_CONNECTION_FAIL"]
    summary = running.logged.find("Connection summary")[0].text
    assert "server_address='127.0.0.1'" in summary
    assert "server_local='(NULL)'" in summary


def test_failing_config_costs_the_session_only(gateway, server):
    running = gateway("""
class Plug(PlugProxy):
    def config(self):
        raise ValueError("defect")
""" + LISTENER)
    assert ended(running.connect())
    running.logged.wait_for("Ending proxy instance")
    assert verdicts(running) == ["ABORTED_BY_POLICY_ACTION"]
    assert running.service("plug").num_instances == 0
    assert server.peers == []


@pytest.mark.parametrize(("raised", "verdict", "text"), [
    ('ValueError("x")', "DENIED_BY_UNKNOWN_FAIL", "Traceback: ValueError: x"),
    ('SystemExit(1)', "DENIED_BY_UNKNOWN_FAIL", "Traceback: SystemExit: 1"),
    ('DACException("x")', "DENIED_BY_POLICY", "DAC policy violation; info='DAC policy violation: x'"),
    ('RuntimeError("x")', "DENIED_BY_UNKNOWN_FAIL", "Unexpected runtime error occured; info='x'"),
])
def test_exception_of_a_router_refuses_the_connection(gateway, raised, verdict, text):
    running = gateway(f"""
from Zorp.Exceptions import *
class Router(DirectedRouter):
    def routeConnection(self, session):
        raise {raised}

def gateway():
    Service("plug", Plug, router=Router(SockAddrInet("127.0.0.1", 9)))
    Listener(SockAddrInet("127.0.0.1", 5001), "plug")
""")
    assert ended(running.connect())
    running.logged.wait_for("Connection denied by policy")
    assert running.logged.find(text)
    assert verdicts(running) == [verdict]
    assert not running.logged.find("Proxy starting")
    assert running.service("plug").num_instances == 0


def test_service_that_the_clients_zone_does_not_list_is_refused(server):
    # given a policy of the times when zones listed services
    policy = """
from Zorp.Core import *
from Zorp.Plug import *
InetZone("local", ["127.0.0.0/8"], outbound_services=["other"], inbound_services=["*"])
def gateway():
    Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $port)))
    Listener(SockAddrInet("127.0.0.1", 5001), "plug")
"""
    with Gateway(policy, port=server.port) as running:
        # when a client of the zone connects
        client = running.connect()
        # then it is closed without a byte, no proxy starts, no server is asked
        assert ended(client)
        running.logged.wait_for("Connection denied by policy")
        assert running.logged.find("Outbound service not permitted; service='plug', client_zone='Zone(local")
        assert running.logged.find(
            "DAC policy violation; info='DAC policy violation: This service was not permitted outbound'")
        assert verdicts(running) == ["DENIED_BY_POLICY"]
        assert not running.logged.find("Proxy starting")
        assert server.peers == []


def test_client_that_leaves_during_the_start_is_accounted_for(gateway):
    running = gateway(LISTENER)
    client = running.connect()
    client.close()
    running.logged.wait_for("Ending proxy instance")
    assert len(running.logged.find("Connection summary")) == 1


def test_no_thread_for_the_proxy(gateway, monkeypatch):
    # given a host that has no thread left
    running = gateway(LISTENER)

    class Full:
        def start(self, name, job):
            return False
    monkeypatch.setattr(running.names["Globals"], "threads", Full())
    # when a client connects
    assert ended(running.connect())
    # then both tries are logged and the session is over
    running.logged.wait_for("Connection denied by policy")
    assert len(running.logged.find("Error creating proxy thread;")) == 2
    assert running.logged.find("Unexpected runtime error occured; info='Error starting proxy in group'")
    assert running.logged.find("Proxy ending; class='Plug', module='plug'")
    assert verdicts(running) == ["DENIED_BY_UNKNOWN_FAIL"]
    assert running.service("plug").num_instances == 0


def test_nothing_of_a_session_waits_for_the_garbage_collector(gateway):
    # given a garbage collector that does not come
    gc.collect()
    gc.disable()
    try:
        running = gateway("""
import weakref
class Plug(PlugProxy):
    def config(self):
        SEEN.update(proxy=weakref.ref(self), stacked=weakref.ref(self.session), master=weakref.ref(self.session.owner))
""" + LISTENER)
        # when a session has ended
        client = running.connect()
        assert exchange(client) == b"ping"
        client.close()
        running.logged.wait_for("Ending proxy instance")
        # then its objects are gone as soon as its thread is
        deadline = time.monotonic() + 10
        while any(reference() is not None for reference in running.seen.values()) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert {name: reference() for name, reference in running.seen.items()} == dict.fromkeys(running.seen)
    finally:
        gc.enable()


def test_stop_request_ends_the_session(gateway):
    # given a client that talks to its server
    from Zorp.engine.builtin_proxy import running as proxies
    running = gateway(LISTENER)
    client = running.connect()
    assert exchange(client) == b"ping"
    session = running.logged.find("Starting proxy instance")[0].session
    # when the administrator stops the session
    assert proxies.stop_session(session) == 1
    # then both sides are closed and the summary is written
    assert ended(client)
    running.logged.wait_for("User initiated proxy termination request received;")
    running.logged.wait_for("Ending proxy instance")
    assert verdicts(running) == ["ACCEPTED"]


# ------------------------------------------------------------------ transparent listeners

def test_transparent_listener_addressed_directly_consumes_no_session(gateway):
    running = gateway("""
def gateway():
    Service("tplug", Plug)
    Listener(SockAddrInet("127.0.0.1", 5001), "tplug", transparent=TRUE)
""")
    running.chains[0].bound([running.chains[0].bind.sa])
    assert ended(running.connect())
    running.logged.wait_for("Transparent listener connected directly, dropping connection")
    assert not running.logged.find("Starting service")
    # the next intercepted one is number 0
    running.connect(to=("127.0.0.1", 1)).close()
    assert running.logged.wait_for("Starting proxy instance").session == "svc/gateway/tplug:0"


def test_release_1_service_is_transparent(gateway, server):
    running = gateway("""
from Zorp.Listener import Listen
def gateway():
    old = Service("old", TransparentChainer(), Plug)
    Listen(SockAddrInet("127.0.0.1", 5001), old, transparent=TRUE)
""")
    assert exchange(running.connect(to=("127.0.0.1", server.port))) == b"ping"


# ------------------------------------------------------------------ zones

ZONES = """
def gateway():
    for name in "abcd":
        service(name)
    {dispatcher}
"""


def served_by(running, source="127.0.0.1", to=None):
    """Return the service that takes a connection, None when it is refused."""
    before = len(running.logged.messages)
    client = running.connect(to=to, source=source)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for message in running.logged.messages[before:]:
            if message.text.startswith("Starting service"):
                client.close()
                return message.arguments[0]
            if message.text.startswith("Connection denied by policy"):
                client.close()
                return None
        time.sleep(0.005)
    raise AssertionError("neither served nor refused")


CLIENT_ZONES = """
Zone("nets", (), admin_parent="local")
Zone("net1", "127.1.0.0/16", admin_parent="nets")
Zone("net2", "127.2.0.0/16", admin_parent="nets")
"""


@pytest.mark.parametrize(("services", "follow", "source", "expected"), [
    ("{'net1': 'a', '*': 'b'}", "FALSE", "127.1.0.1", "a"),
    ("{'net1': 'a', '*': 'b'}", "FALSE", "127.2.0.1", "b"),
    ("{'nets': 'a', '*': 'b'}", "FALSE", "127.1.0.1", "b"),
    ("{'nets': 'a', '*': 'b'}", "TRUE", "127.1.0.1", "a"),
    ("{'local': 'a', 'nets': 'b', 'net1': 'c'}", "TRUE", "127.1.0.1", "c"),
    ("{'local': 'a', 'nets': 'b', 'net1': 'c'}", "TRUE", "127.2.0.1", "b"),
    ("{'local': 'a', 'nets': 'b', 'net1': 'c'}", "TRUE", "127.0.0.1", "a"),
    ("{'nets': 'a'}", "FALSE", "127.1.0.1", None),
])
def test_client_zone_decides(gateway, services, follow, source, expected):
    running = gateway(CLIENT_ZONES + ZONES.format(
        dispatcher=f"ZoneListener(SockAddrInet('127.0.0.1', 5001), {services}, follow_parent={follow})"))
    assert served_by(running, source) == expected
    assert served_by(running, source) == expected           # the second time from the cache
    if expected is None:
        assert running.logged.find("No applicable service found for this client zone; bindto='SockAddrInet(AF_INET("
                                   "127.0.0.1:5001))', client_zone='net1'")
        assert set(verdicts(running)) == {"DENIED_BY_POLICY"}


@pytest.mark.parametrize(("services", "follow", "source", "to", "expected"), [
    ("{('net1', 'internet'): 'a', ('*', '*'): 'b'}", "FALSE", "127.1.0.1", "203.0.113.80", "a"),
    ("{('net1', 'internet'): 'a', ('*', '*'): 'b'}", "FALSE", "127.1.0.1", "10.0.0.1", "b"),
    ("{('net1', 'internet'): 'a', ('*', '*'): 'b'}", "FALSE", "127.2.0.1", "203.0.113.80", "b"),
    ("{('net1', '*'): 'a', ('*', 'internet'): 'b'}", "FALSE", "127.1.0.1", "203.0.113.80", "a"),
    ("{('nets', 'lab'): 'a', ('nets', 'office'): 'b', ('local', 'lab'): 'c'}", "TRUE", "127.1.0.1", "10.7.0.1", "a"),
    ("{('nets', 'office'): 'b', ('local', 'lab'): 'c'}", "TRUE", "127.1.0.1", "10.7.0.1", "b"),
    ("{('nets', 'office'): 'b'}", "FALSE", "127.1.0.1", "10.7.0.1", None),
])
def test_both_zones_decide(gateway, services, follow, source, to, expected):
    running = gateway(CLIENT_ZONES + ZONES.format(
        dispatcher=f"CSZoneListener(SockAddrInet('127.0.0.1', 5001), {services}, follow_parent={follow})"))
    assert served_by(running, source, (to, 80)) == expected
    if expected is None:
        assert running.logged.find("No applicable service found for this client & server zone; bindto='SockAddrInet("
                                   "AF_INET(127.0.0.1:5001))', client_zone='net1', server_zone='lab'")


def test_client_without_a_zone_is_refused_and_the_daemon_keeps_serving():
    policy = """
from Zorp.Core import *
from Zorp.Plug import *
Zone("here", "127.1.0.0/16")
def gateway():
    Service("a", PlugProxy)
    ZoneListener(SockAddrInet("127.0.0.1", 5001), {"*": "a"})
"""
    with Gateway(policy) as running:
        assert served_by(running, "127.2.0.1") is None
        message, = running.logged.find("Zone not found; info='Zone not found: AF_INET(127.2.0.1:")
        assert (message.session, message.tag, message.level) == ("svc", "core.policy", 1)
        assert served_by(running, "127.1.0.1") == "a"


# ------------------------------------------------------------------ rules

def test_rules_choose_and_the_session_knows_which(gateway):
    running = gateway(CLIENT_ZONES + """
def gateway():
    service("a"), service("b")
    Rule(rule_id=7, src_zone="net1", dst_port=80, service="a")
    Rule(rule_id=8, dst_port=[80, 81], service="b")
""")
    assert running.chains[0].bind.format() == "SA(proto=1,addr=AF_INET(127.0.0.1:0))"
    assert all(chain.params.transparent and chain.params.rule_chain for chain in running.chains)
    assert served_by(running, "127.1.0.1", ("203.0.113.80", 80)) == "a"
    assert served_by(running, "127.2.0.1", ("203.0.113.80", 80)) == "b"
    running.logged.wait_for("Connection summary; rule_id='7'")
    assert running.logged.wait_for("Connection summary; rule_id='8'")
    assert running.logged.has("Added value to the session; name='%s', value='%s'", ("rule_id", 7))


def test_no_rule_means_no_service(gateway):
    running = gateway("def gateway():\n    service('a')\n    Rule(dst_port=80, service='a')\n")
    client = running.connect(to=("203.0.113.80", 81))
    assert ended(client)
    running.logged.wait_for("Connection denied by policy")
    message, = running.logged.find("Unable to determine service, KZorp service lookup failed; bindto='SockAddrInet(")
    assert (message.tag, message.level) == ("core.policy", 0)
    assert verdicts(running) == ["DENIED_BY_POLICY"]
    assert "client_zone='local'" in running.logged.find("Connection summary")[0].text
    assert "server_zone='internet'" in running.logged.find("Connection summary")[0].text


def test_rules_see_the_client_that_a_load_balancer_announces(gateway, monkeypatch):
    # given rules by client zone, and a load balancer in front of the rule listener
    from Zorp.Config import config
    monkeypatch.setattr(config.options, "proxy_protocol", ("127.0.0.1/32",))
    running = gateway(CLIENT_ZONES + """
def gateway():
    service("a"), service("b")
    Rule(src_zone="net1", service="a")
    Rule(src_zone="local", service="b")
""")
    # when it announces a client of another zone
    client = running.connect(to=("203.0.113.80", 80))
    client.sendall(b"PROXY TCP4 127.1.2.3 203.0.113.80 5000 80\r\nping")
    # then the rule of that zone decides, and the server gets what follows the header
    assert client.recv(4) == b"ping"
    assert running.logged.wait_for("Starting service").arguments == ("a",)
    assert "client_address='AF_INET(127.1.2.3:5000)'" in running.logged.find("Starting proxy instance")[0].text


def test_one_rule_dispatcher_for_all_rules(gateway):
    running = gateway("""
def gateway():
    service("a")
    for port in (80, 81, 82):
        Rule(dst_port=port, service="a")
""")
    assert len({(chain.protocol, chain.key.family) for chain in running.chains}) == len(running.chains)
    assert {chain.protocol for chain in running.chains} == {1, 2}


def test_dictionaries_of_release_3_choose(gateway):
    running = gateway("""
def gateway():
    service("a"), service("b")
    NDimensionDispatcher(DBSockAddr(SockAddrInet("127.0.0.1", 5001), ZD_PROTO_TCP),
        rules=({"rule_id": 5, "service": "a", "dst_port": "80,443", "dst_zone": "internet"},
               {"rule_id": 6, "service": "b", "dst_zone": ("office",)}), transparent=TRUE)
""")
    assert served_by(running, to=("203.0.113.80", 443)) == "a"
    assert served_by(running, to=("10.7.0.1", 25)) == "b"
    assert served_by(running, to=("203.0.113.80", 25)) is None
    running.logged.wait_for("Connection summary; rule_id='5'")


# ------------------------------------------------------------------ services that are not proxies

def test_packet_service_behind_a_listener_is_relayed(gateway):
    running = gateway("""
def gateway():
    PFService("pf", router=DirectedRouter(SockAddrInet("127.0.0.1", $port)))
    Listener(SockAddrInet("127.0.0.1", 5001), "pf")
""")
    client = running.connect()
    assert exchange(client) == b"ping"
    client.close()
    running.logged.wait_for("Ending proxy instance")
    assert verdicts(running) == ["ACCEPTED"]


def test_packet_service_that_the_packet_filter_should_have_served_is_reset(gateway, monkeypatch):
    # given a packet filter that carries out the policy, and a decision that differs from its own
    running = gateway("""
def gateway():
    PFService("pf", router=DirectedRouter(SockAddrInet("127.0.0.1", $port)))
    Rule(dst_port=80, service="pf")
""")
    monkeypatch.setattr(running.names["Globals"], "kzorp_available", True)
    # when such a connection arrives
    client = running.connect(to=("203.0.113.80", 80))
    # then it is reset with a summary
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    running.logged.wait_for("Connection denied by policy")
    assert verdicts(running) == ["DENIED_BY_POLICY"]
    # while without one it is relayed
    monkeypatch.setattr(running.names["Globals"], "kzorp_available", False)
    assert exchange(running.connect(to=("203.0.113.80", 80))) == b"ping"


@pytest.mark.parametrize("logging", [True, False])
def test_deny_service_behind_a_listener_resets(gateway, logging):
    running = gateway(f"""
def gateway():
    DenyService("no", logging={logging})
    Listener(SockAddrInet("127.0.0.1", 5001), "no")
""")
    client = running.connect()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    running.logged.wait_for("Connection summary")
    assert verdicts(running) == ["DENIED_BY_POLICY"]
    assert bool(running.logged.find("DAC policy violation")) is logging


# ------------------------------------------------------------------ override points

@pytest.mark.parametrize("override", [
    # release 3: a session with client data
    "def getService(self, session):\n        SEEN['zone'] = session.client_zone.name\n"
    "        return Globals.services['b'] if session.client_local.port == 80 else None",
    # release 5: the same through ClientInfo
    "def getService(self, client_info):\n        SEEN['zone'] = client_info.client_zone.name\n"
    "        return Globals.services['b'] if client_info.client_local.port == 80 else None",
    # release 6: the session itself
    "def _getSession(self, client_stream, client_local, client_listen, client_address):\n"
    "        if client_local.port != 80:\n            return None\n"
    "        service = Globals.services['b']\n"
    "        session = MasterSession(service, client_stream, client_local, client_listen, client_address,\n"
    "                                instance_id=getInstanceId(service.name))\n"
    "        SEEN['zone'] = session.client_zone.name\n        return session",
    # any release: accepted()
    "def accepted(self, stream, client_address, client_local, client_listen):\n"
    "        SEEN['zone'] = Zone.lookup(client_address).name\n        self.service = Globals.services['b']\n"
    "        if client_local.port != 80:\n            return None\n"
    "        return Listener.accepted(self, stream, client_address, client_local, client_listen)",
])
def test_sites_override_the_selection(gateway, override):
    running = gateway(f"""
from Zorp.Session import MasterSession
class Own(Listener):
    {override}

def gateway():
    service("a"), service("b")
    Own(SockAddrInet("127.0.0.1", 5001), "a")
""")
    assert served_by(running, to=("203.0.113.80", 80)) == "b"
    assert running.seen == {"zone": "local"}
    assert served_by(running, to=("203.0.113.80", 81)) is None


def test_override_that_raises_refuses(gateway):
    running = gateway("""
from Zorp.Exceptions import *
class Own(Listener):
    def getService(self, session):
        raise DACException("No applicable service found")

def gateway():
    service("a")
    Own(SockAddrInet("127.0.0.1", 5001), "a")
""")
    assert served_by(running) is None
    assert running.logged.find("DAC policy violation; info='DAC policy violation: No applicable service found'")


def test_start_instance_of_a_subclass_gets_the_session(gateway):
    running = gateway("""
class Own(Service):
    def startInstance(self, session):
        SEEN["session"] = type(session).__name__
        return Service.startInstance(self, session)

def gateway():
    Own("own", Plug, router=DirectedRouter(SockAddrInet("127.0.0.1", $port)))
    Listener(SockAddrInet("127.0.0.1", 5001), "own")
""")
    assert exchange(running.connect()) == b"ping"
    assert running.seen == {"session": "MasterSession"}


def test_client_keepalive(gateway):
    running = gateway("""
class Plug(PlugProxy):
    def config(self):
        SEEN[self.session.service.name] = self.session.client_stream.keepalive

def gateway():
    for keepalive in (Z_KEEPALIVE_NONE, Z_KEEPALIVE_CLIENT, Z_KEEPALIVE_SERVER, Z_KEEPALIVE_BOTH):
        Service(f"k{keepalive}", Plug, keepalive=keepalive)
        Listener(SockAddrInet("127.0.0.1", 5001 + keepalive), f"k{keepalive}")
""")
    for chain in range(4):
        running.connect(chain=chain).close()
    running.logged.wait_for("Ending proxy instance", 4)
    assert running.seen == {"k0": 0, "k1": 1, "k2": 0, "k3": 1}


# ------------------------------------------------------------------ two on one address

def test_later_definition_receives_the_connections(gateway):
    running = gateway("""
def gateway():
    service("a"), service("b")
    Listener(SockAddrInet("127.0.0.1", 5001), "a")
    Listener(SockAddrInet("127.0.0.1", 5001), "b")
""")
    assert len(running.chains) == 1
    assert served_by(running) == "b"


def test_a_dispatcher_that_never_serves_is_named_at_load(gateway):
    running = gateway("""
def gateway():
    service("a"), service("b")
    Listener(SockAddrInet("127.0.0.1", 5001), "a")
    Listener(SockAddrInet("127.0.0.1", 5001), "b")
    Listener(SockAddrInet("127.0.0.1", 5002), "b")
""")
    [line] = running.logged.find("Dispatcher never gets a connection")
    _, idle, serving = (str(value).rpartition(":")[2] for value in line.arguments)
    assert int(serving) == int(idle) + 1                 # the later definition wins


def test_dispatcher_with_several_addresses(gateway):
    running = gateway("""
def gateway():
    service("a")
    SEEN["dispatcher"] = Dispatcher([DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP) for port in (1, 2)],
                                    "a", rule_port="80,1024:2048")
""")
    dispatcher = running.seen["dispatcher"]
    assert len(running.chains) == len(dispatcher.dispatches) == 2
    assert dispatcher.rule_port == [(80, 80), (1024, 2048)]
    assert dispatcher.session_id.startswith("gateway/dsp/dispatch:")
    assert (dispatcher.protocol, dispatcher.transparent) == (1, 0)
    assert dispatcher.service is running.service("a")
    dispatcher.destroy()
    assert running.chains == []


def test_deinit_destroys_the_dispatchers(gateway):
    running = gateway(LISTENER)
    running.names["deinit"](["gateway"])
    assert running.chains == []


def test_service_of_a_table_may_be_defined_later(gateway):
    running = gateway("""
def gateway():
    ZoneListener(SockAddrInet("127.0.0.1", 5001), {"*": "late"})
    service("late")
""")
    assert served_by(running) == "late"
