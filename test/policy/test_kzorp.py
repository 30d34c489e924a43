"""The decision for accepted sockets, and the configuration as messages."""

import socket

import pytest

from test.support.zones import define_services, no_zones
from Zorp import Globals, KZorp
from Zorp.Exceptions import PolicyError
from Zorp.Rule import Rule
from Zorp.SockAddr import from_sockaddr
from Zorp.Zone import Zone

__all__ = ["no_zones"]
FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]


@pytest.fixture
def connection(no_zones, request):
    """(client, accepted) over a prepared listener of the family that the test asks for."""
    family, host = request.param
    define_services("s", "t")
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        KZorp.prepare_listener(listener)
        listener.bind((host, 0))
        listener.listen()
        listener.settimeout(5)
        with socket.create_connection(listener.getsockname()[:2], timeout=5) as client:
            accepted, _ = listener.accept()
            with accepted:
                yield client, accepted


over_both_families = pytest.mark.parametrize("connection", FAMILIES, indirect=True, ids=["inet", "inet6"])


def decision_for(accepted):
    """Return the Decision for the packet of a socket, which is also that for the socket."""
    remote, local = (from_sockaddr(accepted.family, name) for name in (accepted.getpeername(), accepted.getsockname()))
    decision = Globals.rules.evaluate(KZorp.packet_of(accepted, remote, local))
    rule, *zones = Globals.rules.decide(accepted, remote, local)
    assert decision == (rule.service, rule.rule_id, *zones)
    return decision


@over_both_families
def test_a_rule_for_the_incoming_interface(connection):
    _, accepted = connection
    Rule(service="s", iface="lo")
    Rule(service="t", iface="eth77")
    assert decision_for(accepted).service_name == "s"


@over_both_families
def test_a_rule_for_the_group_of_the_incoming_interface(connection):
    _, accepted = connection
    Rule(service="s", ifgroup=0)
    Rule(service="t", ifgroup=77)
    assert decision_for(accepted).service_name == "s"


@over_both_families
def test_an_interface_that_the_packet_names_is_not_looked_up(connection):
    _, accepted = connection
    Rule(service="s", iface="lo")
    Rule(service="t", iface="eth77")
    remote, local = (from_sockaddr(accepted.family, name) for name in (accepted.getpeername(), accepted.getsockname()))
    packet = KZorp.packet_of(accepted, remote, local)._replace(iface="eth77")
    assert Globals.rules.evaluate(packet).service_name == "t"


@over_both_families
def test_scenario_19_an_address_of_the_incoming_interface(connection):
    # given a rule for the interface's own addresses
    _, accepted = connection
    Rule(service="s", dst_iface="lo", dst_port=accepted.getsockname()[1])
    # then a connection to one of them is served, one to another local address is not
    assert decision_for(accepted).service_name == "s"
    elsewhere = "192.0.2.1" if accepted.family == socket.AF_INET else "2001:db8::1"
    remote, local = (from_sockaddr(accepted.family, name) for name in (accepted.getpeername(),
                                                                       (elsewhere, *accepted.getsockname()[1:])))
    assert Globals.rules.evaluate(KZorp.packet_of(accepted, remote, local)) is None
    assert Globals.rules.decide(accepted, remote, local)[0] is None


@over_both_families
def test_the_result_for_a_socket_has_the_form_of_the_original(connection):
    _, accepted = connection
    Zone("local", ["127.0.0.0/8", "::1"])
    Rule(rule_id=5, service="s", src_zone="local")
    assert Globals.rules.result_for_socket(accepted.family, accepted.fileno()) == (
        "local", "local", Globals.instance_name, "s", 5)
    accepted.send(b"still open")


@over_both_families
def test_no_rule_is_no_result_and_the_socket_stays_open(connection):
    client, accepted = connection
    Rule(service="s", dst_port=1)
    assert Globals.rules.result_for_socket(accepted.family, accepted.fileno()) is None
    accepted.send(b"x")
    assert client.recv(1) == b"x"


def test_udp_sockets_are_judged_as_udp(no_zones):
    define_services("s", "t")
    Rule(service="s", proto=6)
    Rule(service="t", proto=17)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert decision_for(sock).service_name == "t"


# ------------------------------------------------------------------ messages

@pytest.fixture
def policy(no_zones, monkeypatch):
    monkeypatch.setattr(Globals, "instance_name", "intra")
    define_services("web")
    Zone("office", ["10.1.0.0/16", "2001:db8::/32"])
    Zone("lab", "10.1.7.0/24", admin_parent="office")
    Rule(service="web", src_zone="office", dst_port=80)
    yield
    KZorp.flushKZorpConfig("intra")
    KZorp.flushKZorpConfig(".global")


def test_the_whole_configuration_comes_into_force_at_once(policy):
    KZorp.downloadKZorpConfig("intra", True)
    assert [message["message"] for message in KZorp.running.of("intra")][:3] == [
        "add service", "add dispatcher", "add rule"]
    assert KZorp.running.of("intra")[2]["dimensions"] == {"src_zone": ("office",), "dst_port": ((80, 80),)}
    KZorp.closeKZorpHandle()
    assert KZorp.running.of("intra") == ()


def test_a_process_that_is_not_the_master_adds_no_rules(policy):
    KZorp.downloadKZorpConfig("intra", False)
    assert "add rule" not in [message["message"] for message in KZorp.running.of("intra")]


def test_zones_go_parents_first_with_their_subnets(policy):
    KZorp.downloadStaticZones([Zone.lookupByName("lab"), Zone.lookupByName("office")])
    messages = KZorp.running.of(".global")
    assert [(m["name"], m["admin_parent"]) for m in messages[:2]] == [("office", None), ("lab", "office")]
    assert [(m["zone"], m["bits"]) for m in messages[2:]] == [("office", 16), ("office", 32), ("lab", 24)]


def test_nothing_is_in_force_before_the_commit(policy):
    handle = KZorp.openHandle()
    KZorp.startTransaction(handle, "intra")
    KZorp.downloadZones(handle)
    KZorp.exchangeMessage(handle, "3.9.0 number", {"message": "own"})
    assert KZorp.running.of("intra") == ()
    with pytest.raises(PolicyError, match="A transaction is open already; instance='intra'"):
        KZorp.startTransaction(handle, 0, "intra")
    KZorp.commitTransaction(handle)
    assert KZorp.running.of("intra")[-1] == {"message": "own"}
    with pytest.raises(PolicyError, match="No transaction is open"):
        KZorp.commitTransaction(handle)
