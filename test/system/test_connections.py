"""Connections through a running zorp process: sharing, limits, rules and statistics as seen from outside."""

import socket
import threading

from test.support.gateway import Server, ended, exchange
from test.support.ports import free_port

PLUG = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("all", "0.0.0.0/0")

    def intra():
        Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)), $limits)
        Listener(SockAddrInet("127.0.0.1", $port), "plug")
"""


def test_two_hundred_short_connections_are_all_accounted_for(zorp):
    # given a running instance and two hundred clients, twenty at a time
    with Server() as server:
        daemon = zorp(PLUG, server_port=server.port, limits="")
        answers = []

        def clients():
            for _ in range(10):
                with daemon.connect() as client:
                    answers.append(exchange(client))
        threads = [threading.Thread(target=clients) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # then every one is served, and the log counts each once at the start and once at the end
        assert answers == [b"ping"] * 200
        for number in range(200):
            daemon.log.wait_for("core.session", 4, "Ending proxy instance", session=f"svc/intra/plug:{number}")
        assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 200
        assert len(daemon.log.find("core.session", 4, "Ending proxy instance")) == 200
        assert len(daemon.log.find("core.summary", 4, "Connection summary")) == 200
        # and nothing runs any more
        with daemon.control() as control:
            assert control.ask("GETVALUE service.plug.sessions_running") == "0"
            assert control.ask("GETVALUE service.plug.session_number") == "200"


def test_limit_holds_in_a_running_process(zorp):
    # given a limit of one, and a client that holds it
    with Server() as server:
        daemon = zorp(PLUG, server_port=server.port, limits="max_instances=1")
        first = daemon.connect()
        assert exchange(first) == b"ping"
        # when a second one comes, then it is closed
        assert ended(daemon.connect())
        line = daemon.log.wait_for("core.policy", 1, "Connection over permitted limits")
        assert line.fields == {"info": "Limit error: Instance limit reached"}
        assert daemon.log.wait_for("core.summary", 4, "Connection summary", session=line.session).fields[
            "verdict"] == "DENIED_BY_LIMIT"
        assert daemon.log.wait_for("core.policy", 1, "Connection denied by policy").session == "nosession"
        # and after the first has left, the next is served
        first.close()
        daemon.log.wait_for("core.session", 4, "Ending proxy instance")
        assert exchange(daemon.connect()) == b"ping"


def test_numbers_go_on_after_a_reload_and_running_sessions_keep_their_service(zorp):
    # given a session of the old policy
    with Server() as old_server, Server(serve=lambda sock: sock.sendall(b"new")) as new_server:
        daemon = zorp(PLUG, server_port=old_server.port, limits="")
        held = daemon.connect()
        assert exchange(held) == b"ping"
        # when the policy is replaced by one that goes to another server
        daemon.reload(PLUG, server_port=new_server.port, limits="")
        # then the next connection uses the new one, with the next number
        with daemon.connect() as client:
            assert client.recv(3) == b"new"
        daemon.log.wait_for("core.session", 3, "Starting proxy instance", session="svc/intra/plug:1")
        # and the old session still talks to its server
        assert exchange(held, b"still") == b"still"


def test_rule_listener_refuses_who_addresses_it_directly(zorp):
    # given an instance that serves rules on a fixed loopback port
    daemon = zorp("""
        from Zorp.Core import *
        from Zorp.Plug import *
        config.options.rule_listen_port = $port
        Zone("all", "0.0.0.0/0")

        def intra():
            Service("plug", PlugProxy)
            Rule(dst_port=80, service="plug")
        """)
    # when a local client connects to that port itself
    # then it is closed, and no session starts
    assert ended(daemon.connect())
    daemon.log.wait_for("core.error", 1, "Transparent listener connected directly, dropping connection")
    assert not daemon.log.find("core.session", 5, "Starting service")


def test_two_listeners_in_one_instance(zorp):
    with Server() as server:
        daemon = zorp(PLUG + """
        Listener(SockAddrInet("127.0.0.1", $other_port), "plug")
        """, server_port=server.port, limits="", other_port=(other_port := free_port()))
        assert exchange(daemon.connect()) == b"ping"
        assert exchange(daemon.connect(other_port)) == b"ping"


def test_ipv6_listener(zorp):
    # given a listener on ::1 that leads to an IPv4 server
    with Server() as server:
        daemon = zorp(PLUG.replace('SockAddrInet("127.0.0.1", $port)', 'SockAddrInet6("::1", $port)')
                      .replace('"0.0.0.0/0"', '["0.0.0.0/0", "::/0"]'), server_port=server.port, limits="")
        # when a client comes over IPv6, then it is served and the log shows its address
        with socket.create_connection(("::1", daemon.port), 10) as client:
            assert exchange(client) == b"ping"
            line = daemon.log.wait_for("core.session", 3, "Starting proxy instance")
            assert line.fields["client_address"] == f"AF_INET6(::1:{client.getsockname()[1]})"


def test_connections_go_on_joining_a_quiet_plug_after_others_have_left(zorp):
    # given a plug that lets others join, without a shutdown() of its own, and a log that is not asked for events
    with Server() as server:
        daemon = zorp("""
            from Zorp.Core import *
            from Zorp.Plug import *

            class Joined(PlugProxy):
                secondary_mask = 0
                secondary_sessions = 1

            def intra():
                Service("plug", Joined, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
                Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
            """, server_port=server.port, verbosity=4)
        # when one comes after the other, more than may share the proxy, each after the end of the one before
        for count in range(1, 5):
            with daemon.connect() as client:
                assert exchange(client) == b"ping"
            # then each is served, and none joins one that has ended
            daemon.log.wait_for("core.summary", 4, "Connection summary", count=count)
    assert not daemon.log.find("core.session", 3, "Starting secondary session")
