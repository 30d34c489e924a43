"""Sessions: forms of construction, inheritance, ids, the counted life, the summary line."""

import re
import socket
import threading

import pytest

from Zorp import Exceptions, Globals, Log, Szig
from Zorp.acceptance.binds import DBSockAddr
from Zorp.Config import config
from Zorp.Constants import FALSE, TRUE, ZD_PROTO_TCP, ZD_PROTO_UDP, ZV_ACCEPT, ZV_REJECT
from Zorp.Exceptions import DACException, LimitException
from Zorp.Session import AbstractSession, ClientInfo, MasterSession, StackedSession, get_protocol_name
from Zorp.SockAddr import SockAddrInet
from Zorp.Stream import Stream
from Zorp.Szig import Statistics
from Zorp.acceptance.verdict import DENIED_BY_CONNECTION_FAIL, ConnectionVerdict, refuse

from test.support.logged import captured_log
from test.support.world import policy_world

CLIENT = SockAddrInet("10.0.0.5", 40000)
WANTED = SockAddrInet("203.0.113.80", 80)


class Service:
    """What a session needs of a service."""

    chainer = None
    limit_target_zones_to = None

    def __init__(self, name="web"):
        self.name = name
        self.stopped = []

    def __str__(self):
        return self.name

    def stopInstance(self, session):
        self.stopped.append(session)


class Proxy:
    """What a session needs of a proxy."""

    def __init__(self, name="http"):
        self.name = name


@pytest.fixture
def logged():
    with captured_log() as logged:
        yield logged


@pytest.fixture
def zones():
    with policy_world(zones=False) as names:
        zone = names["Zone"]
        zone("office", "10.0.0.0/8")
        zone("lab", "10.7.0.0/16", admin_parent="office")
        zone("internet", "0.0.0.0/0")
        Globals.virtual_instance_name = "inst#0"
        yield zone


@pytest.fixture
def id_format(monkeypatch):
    return lambda form: monkeypatch.setattr(config.options, "session_id_format", form)


def master(service=None, **values):
    return MasterSession(service or Service(), None, WANTED, DBSockAddr(SockAddrInet("10.0.0.1", 50080), ZD_PROTO_TCP),
                         CLIENT, **values)


# ------------------------------------------------------------------ construction

def test_release_6_form_takes_extra_values_as_attributes(zones, logged):
    session = master(instance_id=7, rule_id=3, colour="red")
    assert (session.instance_id, session.rule_id, session.colour) == (7, 3, "red")
    assert session.client_zone is zones.lookup(CLIENT)
    assert (session.protocol, session.protocol_name) == (ZD_PROTO_TCP, "TCP")
    assert logged.has("Added value to the session; name='%s', value='%s'", ("colour", "red"))


def test_release_6_form_looks_up_missing_zones_only(zones):
    lab = zones.zones["lab"]
    session = master(client_zone=lab, server_address=WANTED)
    assert session.client_zone is lab
    assert session.server_zone is zones.zones["internet"]


def test_release_5_form(zones):
    info = ClientInfo(None, WANTED, None, CLIENT)
    assert info.client_zone is zones.zones["office"]
    session = MasterSession(ZD_PROTO_UDP, Service("dns"), info, 4)
    assert (session.protocol_name, session.instance_id, session.client_address) == ("UDP", 4, CLIENT)
    assert session.client_zone is info.client_zone
    assert session.session_id.endswith("/dns:4")


def test_release_3_form(zones):
    session = MasterSession()
    assert session.session_id == "svc"
    session.setProtocol(ZD_PROTO_TCP)
    session.setClientAddress(CLIENT)
    assert session.client_zone is zones.zones["office"]
    session.setService(Service())
    session.setServiceInstance(9)
    assert session.session_id.endswith("/web:9")


def test_initial_values(zones):
    session = master()
    assert (session.auth_user, session.auth_groups, session.authorized) == ("", (), FALSE)
    assert (session.target_address, session.target_zone, session.target_local) == ((), [], None)
    assert (session.target_address_inband, session.target_local_loose, session.target_local_random) == (
        FALSE, TRUE, FALSE)
    assert (session.server_stream, session.server_address, session.server_zone, session.server_local) == (None,) * 4
    assert (session.started, session.base_session_id, session.rule_id) == (0, "svc", None)
    assert session.verdict == ConnectionVerdict(ConnectionVerdict.ACCEPTED)


def test_protocol_names():
    assert [get_protocol_name(n) for n in (0, 1, 2, 9)] == ["AUTO", "TCP", "UDP", "Unknown(9)"]


# ------------------------------------------------------------------ inheritance

def test_child_reads_what_the_parent_stored_and_keeps_its_own_writes(zones):
    # given a proxy that leaves a note before it stacks a child
    parent = StackedSession(master())
    parent.mynote = "x"
    child = StackedSession(parent)
    # then the child reads it, also when it changes
    assert child.mynote == "x"
    parent.mynote = "y"
    assert child.mynote == "y"
    # and a value written by the child is not seen by the parent
    child.mynote = "z"
    assert parent.mynote == "y"


def test_missing_attribute_is_an_attribute_error(zones):
    child = StackedSession(StackedSession(master()))
    assert not hasattr(child, "nosuch")
    assert getattr(child, "nosuch", 5) == 5


@pytest.mark.parametrize(("name", "value"), [("protocol", ZD_PROTO_UDP), ("target_local", CLIENT), ("note", "mine")])
def test_what_the_owner_changes_is_heard_until_the_session_has_its_own(zones, name, value):
    """protocol and target_local are found in another way than the other names, and behave the same."""
    top = master()
    session = StackedSession(StackedSession(top))
    setattr(top, name, value)
    assert getattr(session, name) is value
    setattr(session, name, None)
    assert getattr(session, name) is None
    assert getattr(session.owner, name) is value


def test_methods_of_the_owner_are_not_inherited_but_its_other_callables_are(zones):
    top = master()
    session = StackedSession(top)
    assert not hasattr(session, "setClientAddress")
    top.helper = "abc".upper
    assert session.helper() == "ABC"


def test_master_is_found_from_every_level(zones):
    top = master()
    child = StackedSession(StackedSession(top))
    assert child.getMasterSession() is top.getMasterSession() is top
    assert isinstance(child, AbstractSession)
    assert child.client_address == CLIENT
    assert child.service is top.service


def test_child_does_not_see_the_parents_streams_and_proxy(zones):
    parent = StackedSession(master(), "chainer")
    parent.client_stream = parent.server_stream = "stream"
    parent.setProxy(Proxy())
    child = StackedSession(parent)
    assert (child.client_stream, child.server_stream, child.proxy, child.chainer) == (None,) * 4
    assert child.owner.proxy is parent.proxy
    assert child.http is parent.proxy


def test_server_address_goes_to_the_master_too(zones):
    top = master()
    session = StackedSession(top)
    session.setServerAddress(WANTED)
    assert session.server_zone is top.server_zone is zones.zones["internet"]
    assert top.server_address is WANTED


def test_target_address_is_a_sequence_with_zones(zones):
    session = StackedSession(master())
    session.setServer(WANTED)
    assert session.target_address == (WANTED,)
    session.setTargetAddress([CLIENT, WANTED])
    assert [zone.name for zone in session.target_zone] == ["office", "internet"]
    assert session.getMasterSession().target_address == ()
    # a level below sees the target of its owner
    assert StackedSession(session).target_address == (CLIENT, WANTED)
    assert len(StackedSession(session).target_zone) == 2


def test_hostname_hint_counts_only_inband(zones, logged):
    class Resolver:
        asked = []

        def resolve(self, host, port):
            self.asked.append((host, port))
            return (WANTED,) if host == "www" else None
    service = Service()
    service.resolver_policy = Resolver()
    session = StackedSession(master(service))
    assert session.setTargetAddressByHostname("www", 80) == TRUE
    assert session.target_address == ()
    session.target_address_inband = TRUE
    assert session.setTargetAddressByHostname("www", 80) == TRUE
    assert session.target_address == (WANTED,)
    assert session.setTargetAddressByHostname("nosuch", 80) == FALSE
    assert logged.has("Error resolving hostname; host='%s'", ("nosuch",))


def test_old_names_of_the_streams(zones):
    session = StackedSession(master())
    session.client_stream, session.server_stream = "c", "s"
    assert (session.client_fd, session.server_fd) == ("c", "s")


# ------------------------------------------------------------------ permissions

def test_limit_target_zones_to_accepts_the_zone_and_what_is_below_it(zones, logged):
    service = Service()
    session = StackedSession(master(service))
    service.limit_target_zones_to = ("office",)
    session.setServerAddress(SockAddrInet("10.7.1.1", 80))
    assert session.isServerPermitted() == ZV_ACCEPT
    session.setServerAddress(WANTED)
    assert session.isServerPermitted() == ZV_REJECT
    assert logged.find("Outbound connection not permitted; service='web', client_zone='Zone(office)',"
                       " client='AF_INET(10.0.0.5:40000)', server_zone='Zone(internet)',"
                       " server='AF_INET(203.0.113.80:80)'")


@pytest.mark.parametrize("limits", ["target zones", "service lists"])
def test_a_server_that_host_names_of_several_zones_have_must_be_permitted_in_all_of_them(logged, limits):
    with policy_world(zones=False) as names:
        # given a zone that may not be entered and two of which one has its address
        zone, service = names["Zone"], Service()
        lists = {"inbound_services": ["web"]} if limits == "service lists" else {}
        zone("internet", ["0.0.0.0/0"], **lists)
        zone("blocked", hostnames="a.example")
        zone("partner", hostnames="b.example", **lists)
        service.limit_target_zones_to = ("internet", "partner") if not lists else None
        session = StackedSession(master(service))
        session.setServerAddress(WANTED)
        assert session.isServerPermitted() == ZV_ACCEPT
        # when a host name of each has the server's address, then it counts as one of the first
        feed = zone.zone_subnet_tree.feed
        feed({"a.example": [WANTED.ip_s], "b.example": [WANTED.ip_s]})
        assert session.isServerPermitted() == ZV_REJECT
        feed({"a.example": []})
        assert session.isServerPermitted() == ZV_ACCEPT


def test_everything_is_permitted_without_lists(zones):
    session = StackedSession(master())
    session.setServerAddress(WANTED)
    assert session.isServerPermitted() == session.isClientPermitted() == ZV_ACCEPT


def test_service_lists_of_zones_are_enforced_both_ways(logged):
    with policy_world(zones=False) as names:
        zone = names["Zone"]
        zone("office", ["10.0.0.0/8"], inbound_services=[], outbound_services=["web"])
        zone("internet", ["0.0.0.0/0"], inbound_services=["mail"], outbound_services=[])
        web, mail = StackedSession(master()), StackedSession(master(Service("mail")))
        for session in (web, mail):
            session.setServerAddress(WANTED)
        assert (web.isClientPermitted(), web.isServerPermitted()) == (ZV_ACCEPT, ZV_REJECT)
        assert (mail.isClientPermitted(), mail.isServerPermitted()) == (ZV_REJECT, ZV_ACCEPT)
        assert logged.find("Inbound service not permitted; service='web'")
        assert logged.find("Outbound service not permitted; service='mail'")
        with pytest.raises(Exceptions.DACException, match="This service was not permitted outbound"):
            mail.checkClientPermitted()


# ------------------------------------------------------------------ ids

@pytest.mark.parametrize(("form", "master_id", "proxy_id", "secondary_id"), [
    ("3", "svc/web:5", "svc/web:5/http", "svc/web:5/http"),
    ("5", "svc/web:5", "svc/web:5/http", "svc/web:5:2/http"),
    ("7", "svc/inst#0/web:5", "svc/inst#0/web:5/inst#0/http", "svc/inst#0/web:5/inst#0:2/http"),
    ("short", "svc/inst#0/web:5", "svc/inst#0/web:5/http", "svc/inst#0/web:5:2/http"),
    ("nonsense", "svc/inst#0/web:5", "svc/inst#0/web:5/inst#0/http", "svc/inst#0/web:5/inst#0:2/http"),
])
def test_forms_of_ids(zones, id_format, form, master_id, proxy_id, secondary_id):
    id_format(form)
    top = master(instance_id=5)
    session, secondary = StackedSession(top), StackedSession(top)
    session.setProxy(Proxy())
    secondary.secondary_connection_id = 2
    secondary.setProxy(Proxy())
    assert top.session_id == top.master_session_id == master_id
    assert session.session_id == proxy_id
    assert secondary.session_id == secondary_id


def test_stacked_child_replaces_the_proxy_part(zones):
    parent = StackedSession(master(instance_id=1))
    parent.setProxy(Proxy("http"))
    child = StackedSession(parent)
    child.setProxy(Proxy("plug"))
    assert child.session_id == parent.session_id.removesuffix("http") + "plug"


@pytest.mark.parametrize(("name", "shown"), [
    ("a b", "a<20>b"), ("x'y", "x<27>y"), ('x"y', "x<22>y"), ("x)y", "x<29>y"), ("x\ny", "x<0A>y"), ("déjà", "déjà")])
def test_ids_never_contain_what_parsers_stumble_over(zones, name, shown):
    assert master(Service(name)).session_id == f"svc/inst#0/{shown}:0"


# ------------------------------------------------------------------ life

def stream_pair():
    ours, peer = socket.socketpair()
    return Stream(ours), peer


def test_last_release_ends_the_session_once(zones, logged):
    # given a session held by the accepting code and one proxy
    service = Service()
    session = master(service)
    session.client_stream, peer = stream_pair()
    session.hold()
    # when the first lets go, nothing happens
    session.release()
    assert service.stopped == []
    # when the last does, then the socket is closed, the summary written, the service told; once
    session.release()
    session.release()
    assert peer.recv(1) == b""
    assert service.stopped == [session]
    assert len(logged.find("Connection summary")) == 1


def test_summary_comes_after_the_sockets_are_closed_and_before_the_service_is_told(zones, logged):
    events = []

    class Recording(Service):
        def stopInstance(self, session):
            events.append(("stopped", session.client_stream.fd, len(logged.find("Connection summary"))))
    session = master(Recording())
    session.client_stream, _peer = stream_pair()
    session.release()
    assert events == [("stopped", -1, 1)]


def test_end_is_complete_although_a_step_fails(zones, logged):
    class Failing(Service):
        def stopInstance(self, session):
            raise ValueError("policy defect")
    session, done = master(Failing()), []
    session.call_at_end(done.append, 1)
    session.release()
    assert done == [1]
    assert logged.find("Connection summary")


def test_many_threads_letting_go_end_the_session_once(zones):
    service = Service()
    session = master(service)
    for _ in range(49):
        session.hold()
    barrier = threading.Barrier(50)

    def work():
        barrier.wait()
        session.release()
    threads = [threading.Thread(target=work) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(service.stopped) == 1


def test_summary_of_a_served_connection(zones, logged):
    # given an HTTP session from 10.0.0.5:40000 through rule 3
    session = master(rule_id=3, instance_id=0)
    session.start_time = 1570611049.7
    proxied = StackedSession(session)
    proxied.setServerAddress(WANTED)
    session.server_local = SockAddrInet("198.51.100.1", 35512)
    session.auth_user = "joe"
    session.release()
    # then one line has all fields in their order
    message, = logged.find("Connection summary")
    text, _, rest = message.text.partition("session_end='")
    assert (message.session, message.tag, message.level) == ("svc/inst#0/web:0", "core.summary", 4)
    assert text == "Connection summary; rule_id='3', session_start='1570611049', "
    assert rest.partition("', ")[2] == (
        "client_proto='TCP', client_address='10.0.0.5', client_port='40000', client_zone='office', "
        "server_proto='TCP', server_address='203.0.113.80', server_port='80', server_zone='internet', "
        "client_local='203.0.113.80', client_local_port='80', server_local='198.51.100.1', server_local_port='35512', "
        "verdict='ACCEPTED', info='', auth_user='joe'")


def test_summary_of_what_is_not_known(logged):
    with policy_world(zones=False):
        MasterSession(None, None, None, None, None).release()
    message, = logged.find("Connection summary; rule_id='N/A', session_start='")
    assert message.session == "svc"
    assert message.text.endswith(
        "client_proto='TCP', client_address='(NULL)', client_port='0', client_zone='(NULL)', "
        "server_proto='TCP', server_address='(NULL)', server_port='0', server_zone='(NULL)', "
        "client_local='(NULL)', client_local_port='0', server_local='(NULL)', server_local_port='0', "
        "verdict='ACCEPTED', info='', auth_user='(NULL)'")


class Unspeakable:
    """What a policy should not put into a session."""

    ip_s = "10.0.0.9"

    def __str__(self):
        raise SystemExit("no text")

    def getName(self):
        raise RuntimeError("no name")

    @property
    def port(self):
        raise RuntimeError("no port")


@pytest.mark.parametrize(("name", "value", "field"), [
    ("client_zone", "office", "client_zone='office'"),
    ("server_zone", 5, "server_zone='5'"),
    ("client_zone", Unspeakable(), "client_zone='(NULL)'"),
    ("client_address", Unspeakable(), "client_address='(NULL)', client_port='0'"),
    ("server_address", "10.0.0.9:80", "server_address='(NULL)', server_port='0'"),
    ("auth_user", Unspeakable(), "auth_user='(NULL)'"),
    ("rule_id", Unspeakable(), "rule_id='(NULL)'"),
    ("verdict", Unspeakable(), "verdict='(NULL)'"),
])
def test_summary_is_written_whatever_a_policy_has_set(zones, logged, name, value, field):
    service = Service()
    session = master(service)
    setattr(session, name, value)
    session.release()
    message, = logged.find("Connection summary; ")
    assert field in message.text
    assert service.stopped == [session]


def test_summary_is_written_when_the_chainer_cannot_tell_its_protocol(zones, logged):
    class Chainer:
        def getProtocol(self):
            raise RuntimeError("of a policy")
    service = Service()
    service.chainer = Chainer()
    master(service).release()
    message, = logged.find("Connection summary; ")
    assert "server_proto='TCP'" in message.text


def test_summary_names_the_chainers_protocol(zones, logged):
    class Chainer:
        def getProtocol(self):
            return ZD_PROTO_UDP
    service = Service()
    service.chainer = Chainer()
    master(service).release()
    assert "client_proto='TCP'" in logged.find("Connection summary")[0].text
    assert "server_proto='UDP'" in logged.find("Connection summary")[0].text


def test_sessions_show_in_the_statistics_while_they_run(zones, monkeypatch):
    statistics = Statistics()
    monkeypatch.setattr(Szig, "statistics", statistics)
    monkeypatch.setattr("Zorp.Session.statistics", statistics)
    top = master(instance_id=17)
    top.hold()
    statistics.service_started("web", 17, 1.0)
    session = StackedSession(top)
    session.setProxy(Proxy())
    session.registerStart()
    session.registerStart()
    session.setServerAddress(WANTED)
    session.registerServerAddress()
    node = statistics.tree()["conns"]["web"]["17"]["0"]["0"]
    assert node["client_zone"] == "office"
    assert node["session_id"] == "svc/inst#0/web:17/inst#0"
    assert node["server_address"] == "AF_INET(203.0.113.80:80)"
    session.release()
    assert statistics.value(("stats", "sessions_running")) == "0"


def registered(monkeypatch):
    """Return statistics, a master session and the session of a proxy below it that they show."""
    statistics = Statistics()
    monkeypatch.setattr("Zorp.Session.statistics", statistics)
    top = master(instance_id=17)
    statistics.service_started("web", 17, 1.0)
    session = StackedSession(top)
    session.setProxy(Proxy())
    session.registerStart()
    return statistics, top, session


def test_statistics_take_text_for_a_zone(zones, monkeypatch):
    statistics, top, session = registered(monkeypatch)
    top.client_zone = "anywhere"
    session.setServerAddress(WANTED)
    session.registerServerAddress()
    assert statistics.value(("conns", "web", "17", "0", "0", "client_zone")) == "anywhere"
    assert statistics.value(("service", "web", "outbound_zones")) == "anywhere(1)"
    session.release()


def test_statistics_run_no_code_of_a_policys_objects(zones, monkeypatch):
    asked = []

    class Foreign:
        def __str__(self):
            asked.append("str")
            return "text"

        def getName(self):
            asked.append("name")
            return "name"

    statistics, top, session = registered(monkeypatch)
    top.client_zone = top.client_address = Foreign()
    node = statistics.tree()["conns"]["web"]["17"]["0"]["0"]
    assert (node["client_zone"], node["client_address"]) == ("(Foreign)", "(Foreign)")
    assert not asked
    session.release()


@pytest.mark.parametrize(("problem", "verdict", "reason"), [
    (DACException("not from there"), "DENIED_BY_POLICY", "DAC policy violation: not from there"),
    (LimitException("Instance limit reached"), "DENIED_BY_LIMIT", "Limit error: Instance limit reached"),
    (ValueError("defect"), "DENIED_BY_UNKNOWN_FAIL", "ValueError: defect"),
    (None, "DENIED_BY_CONNECTION_FAIL", "no connection to the server"),
])
@pytest.mark.parametrize("structured", [False, True])
def test_structured_summaries_say_why_a_connection_was_refused(zones, logged, monkeypatch, structured, problem,
                                                               verdict, reason):
    monkeypatch.setattr(Log, "_is_structured", structured)
    session = master()
    try:
        if problem is None:
            session.verdict = DENIED_BY_CONNECTION_FAIL
        else:
            raise problem
    except Exception as raised:
        refuse(session, raised)
    session.release()
    message, = logged.find("Connection summary")
    fields = dict(re.findall(r"(\w+)='([^']*)'", message.text))
    assert fields["verdict"] == verdict
    assert fields["info"] == (reason if structured else "")
