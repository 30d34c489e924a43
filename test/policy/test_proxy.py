"""The life of a proxy, calls into policy code, connecting: what policies and log readers see."""

from __future__ import annotations

import types

import pytest

from test.support.gateway import ended
from test.support.proxies import events_of, serve
from Zorp.engine import builtin_proxy as core
from Zorp.engine.builtin_proxy import running
from Zorp.Constants import FALSE, ZD_PROTO_TCP, ZD_PROTO_UDP, ZV_ACCEPT
from Zorp.Exceptions import (
    AAException, DACException, LicenseException, LimitException, MACException, ZoneException,
)
from Zorp.Plug import PlugProxy
from Zorp.engine.policy_hash import ActionError, PolicyHash, parse_action
from Zorp.Proxy import Proxy, proxyLog

__all__ = ["serve"]          # fixture

EVENTS = ("__pre_config__", "config", "__post_config__", "__pre_startup__", "startup", "__post_startup__",
          "__pre_shutdown__", "shutdown", "__post_shutdown__", "__destroy__")


class Asking(PlugProxy):
    """An engine that asks its policy and remembers what came of it."""

    outcome = None

    def policy(self):
        return ZV_ACCEPT

    def _engine_main(self):
        type(self).outcome = None
        type(self).outcome = self._ask_policy(self.policy)


# life cycle

def test_events_run_in_their_order(serve):
    # given a class with every event, recording its name
    proxy_class = events_of(PlugProxy, EVENTS)
    # when one session runs
    with serve(proxy_class) as session:
        session.client.sendall(b"x")
        assert session.server.recv(1) == b"x"
    # then each was called once, in this order, and announced
    assert proxy_class.calls == list(EVENTS)
    called = [message.arguments[0] for message in session.log.find("calling event; ")]
    assert called == list(EVENTS[:-1])
    assert session.log.find("calling __destroy__() event;")
    assert session.verdict == "ACCEPTED"


def test_log_of_one_life(serve):
    with serve(PlugProxy) as session:
        session.client.sendall(b"x")
        assert session.server.recv(1) == b"x"
    wanted = ["Proxy starting; class='PlugProxy', proxy='plug'", "Proxy destroy; class='PlugProxy', module='plug'",
              "Proxy ending; class='PlugProxy', module='plug'", "Connection summary; "]
    seen = [text for text in session.log.texts() if text.startswith(tuple(wanted))]
    assert [text[:20] for text in seen] == [text[:20] for text in wanted]
    starting = session.log.find("Proxy starting")[0]
    assert starting.session.endswith("/plug")
    assert starting.session.startswith(session.master.session_id + "/")


def test_events_that_do_not_exist_are_announced_too(serve):
    # recorded logs of the original show every event of a session, whatever its class defines
    with serve(PlugProxy) as session:
        session.client.close()
        session.wait_for_end()
    assert [message.arguments[0] for message in session.log.find("calling event; ")] == list(EVENTS[:-1])


def test_freed_object_says_so(serve):
    with serve(PlugProxy) as session:
        session.client.close()
        session.wait_for_end()
        del session.proxy
        line = session.log.wait_for("Freeing ZProxy instance;")
    assert (line.tag, line.level) == ("core.debug", 7)


def test_config_that_raises_ends_the_session_unheard(serve):
    # given config() that raises ValueError
    class Broken(events_of(PlugProxy, ("shutdown", "__destroy__", "startup"))):
        def config(self):
            raise ValueError("no such thing")

    # when a client connects
    with serve(Broken) as session:
        # then it is closed without a byte, and no server is contacted
        assert session.client.recv(1) == b""
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
        assert not session.server_was_contacted
    # and shutdown and destroy still ran, startup did not
    assert Broken.calls == ["shutdown", "__destroy__"]
    assert "Traceback: ValueError: no such thing" in session.log.texts("core.error")


def test_family_stops_at_the_first_exception_but_shutdown_runs_whole(serve):
    class Broken(events_of(PlugProxy, EVENTS)):
        def startup(self):
            self.calls.append("startup")
            raise RuntimeError("startup")

        def shutdown(self):
            self.calls.append("shutdown")
            raise RuntimeError("shutdown")

    with serve(Broken) as session:
        session.wait_for_end()
    assert Broken.calls == ["__pre_config__", "config", "__post_config__", "__pre_startup__", "startup",
                            "__pre_shutdown__", "shutdown", "__post_shutdown__", "__destroy__"]


def test_old_event_name_is_called_and_reported_once(serve, monkeypatch):
    monkeypatch.setattr(core, "_old_names_reported", set())

    class Old(PlugProxy):
        calls = []

        def startUp(self):
            self.calls.append("startUp")

    lines = []
    for _ in range(2):
        with serve(Old) as session:
            session.client.close()
            session.wait_for_end()
            lines += session.log.find("Obsolete policy handler in Proxy definition")
    assert Old.calls == ["startUp", "startUp"]
    assert [line.text for line in lines] == [
        "Obsolete policy handler in Proxy definition; new_name='startup', old_name='startUp'"]
    assert (lines[0].tag, lines[0].level, lines[0].session) == ("core.policy", 0, None)


def test_event_set_on_the_object_is_called(serve):
    called = []

    class Late(PlugProxy):
        def config(self):
            self.startup = lambda: called.append("startup")

    with serve(Late) as session:
        session.client.close()
        session.wait_for_end()
    assert called == ["startup"]


def test_event_that_cannot_be_called_counts_as_missing(serve):
    class Odd(PlugProxy):
        startup = 7

    with serve(Odd) as session:
        session.client.sendall(b"x")
        assert session.server.recv(1) == b"x"
    assert "Traceback: TypeError: Event must be callable: startup" in session.log.texts("core.error")


@pytest.mark.parametrize("event", ["__pre_config__", "config", "__post_config__"])
@pytest.mark.parametrize("value", [5, None])
def test_configuration_that_cannot_be_called_ends_the_session(serve, event, value):
    class Odd(PlugProxy):
        pass

    setattr(Odd, event, value)
    with serve(Odd) as session:
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert any(f"TypeError: Event must be callable: {event}" in text for text in session.log.texts("core.error"))


def test_exit_of_policy_code_ends_only_the_session(serve):
    class Quitter(PlugProxy):
        def config(self):
            raise SystemExit(3)

    with serve(Quitter) as session:
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_crash_of_an_engine_is_no_accepted_session(serve):
    class Crashing(PlugProxy):
        def _engine_main(self):
            raise ZeroDivisionError("ours")

    with serve(Crashing) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == "DENIED_BY_UNKNOWN_FAIL"
    assert "Traceback: ZeroDivisionError: ours" in session.log.texts("core.error")


def test_destroy_that_raises_still_closes_both_sides(serve):
    class Stubborn(PlugProxy):
        def __destroy__(self):
            raise RuntimeError("no")

    with serve(Stubborn) as session:
        server = session.server
        session.client.close()
        assert server.recv(1) == b""
        session.wait_for_end()
    assert session.log.find("Proxy ending")


def test_finished_proxy_keeps_only_its_session(serve):
    with serve(PlugProxy) as session:
        session.client.close()
        session.wait_for_end()
    assert vars(session.proxy).keys() == {"session", "_session_id", "_state", "_ended"}
    assert session.session.proxy is None
    assert session.proxy not in running.all()


def test_class_without_an_engine_cannot_be_bound(serve):
    class Nothing(Proxy):
        name = "nothing"

    with pytest.raises(RuntimeError, match="Error binding proxy implementation"), serve(Nothing):
        pass


def test_client_must_be_a_stream():
    class NoSession:
        owner = session_id = service = None
        client_stream = "not a stream"

        def setProxy(self, proxy):
            self.proxy = proxy

    with pytest.raises(TypeError, match="client must be a ZPolicyStream"):
        PlugProxy(NoSession())


# calls into policy code

@pytest.mark.parametrize(("problem", "line"), [
    (DACException("x"), "DAC policy violation; reason='x'"),
    (AAException("y"), "Authentication or authorization failed; reason='y'"),
    (type("Own", (Exception,), {"what": "Own thing"})(), "Own thing;"),
])
def test_exception_with_what_is_one_line(serve, problem, line):
    class Raising(Asking):
        def policy(self):
            raise problem

    with serve(Raising) as session:
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert session.log.texts("core.error") == [line]
    assert session.log.find(line)[0].level == 3


@pytest.mark.parametrize("answer", [None, "1", 1.0])
def test_answer_that_is_no_verdict_aborts(serve, answer):
    class Silent(Asking):
        def policy(self):
            return answer

    with serve(Silent) as session:
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert Silent.outcome is None


def test_malformed_table_entry_has_its_own_verdict(serve):
    class Malformed(PlugProxy):
        def _engine_main(self):
            table = PolicyHash({"GET": ("accept",)})
            try:
                parse_action(table.search("GET"))
            except ActionError:
                self._invalid_policy_call()

    with serve(Malformed) as session:
        assert session.verdict == "INVALID_POLICY_CALL"


def test_first_reason_for_the_end_stays(serve):
    class Twice(PlugProxy):
        def _engine_main(self):
            self._invalid_policy_call()
            self._closed_by_abort()

    with serve(Twice) as session:
        assert session.verdict == "INVALID_POLICY_CALL"


@pytest.mark.parametrize(("protocol", "timeout"), [(ZD_PROTO_TCP, 600_000), (ZD_PROTO_UDP, 60_000)])
def test_udp_sessions_idle_for_a_minute_at_most(serve, protocol, timeout):
    class Looking(PlugProxy):
        seen = None

        def config(self):
            type(self).seen = self.timeout

    with serve(Looking, start=False) as session:
        session.master.protocol = protocol
        session.start()
        session.client.close()
        session.wait_for_end()
    assert Looking.seen == timeout


def test_answer_of_the_policy_reaches_the_engine(serve):
    with serve(Asking) as session:
        assert session.verdict == "ACCEPTED"
    assert Asking.outcome == ZV_ACCEPT


def test_overridden_closed_by_abort_decides_the_verdict(serve):
    class Own(Asking):
        def policy(self):
            return None

        def closedByAbort(self):
            self.noticed = True

    with serve(Own) as session:
        assert session.verdict == "ACCEPTED"


def test_proxy_log_formats_only_what_is_written():
    class Loud:
        def __str__(self):
            raise AssertionError("stringified")

    proxy = types.SimpleNamespace(session=types.SimpleNamespace(session_id="svc/x:0/y"))
    proxyLog(proxy, "core.info", 10, "x %s", (Loud(),))


def test_failure_inside_a_nested_call_is_logged_once(serve):
    class Nested(Asking):
        def inner(self):
            raise ValueError("inner")

        def policy(self):
            return self._ask_policy(self.inner)

    with serve(Nested) as session:
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert session.log.texts("core.error").count("Traceback: ValueError: inner") == 1
    assert not any("PolicyCallFailed" in text for text in session.log.texts())


# the server side

def test_closed_port_denies_by_connection_fail(serve):
    with serve(PlugProxy, server_listens=False) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == "DENIED_BY_CONNECTION_FAIL"


@pytest.mark.parametrize(("problem", "verdict", "line"), [
    (ZoneException("1.2.3.4"), "DENIED_BY_POLICY", "Zone not found; info='Zone not found: 1.2.3.4'"),
    (DACException("Server connection is not permitted"), "DENIED_BY_POLICY",
     "DAC policy violation; info='DAC policy violation: Server connection is not permitted'"),
    (MACException("m"), "DENIED_BY_POLICY", "MAC policy violation; info='MAC policy violation: m'"),
    (AAException("a"), "DENIED_BY_POLICY",
     "Authentication failure; info='Authentication or authorization failed: a'"),
    (LimitException("l"), "DENIED_BY_LIMIT", "Connection over permitted limits; info='Limit error: l'"),
    (LicenseException("l"), "DENIED_BY_LIMIT",
     "Attempt to use an unlicensed component, or number of licensed hosts exceeded;"
     " info='Attempt to use unlicensed components: l'"),
    (ArithmeticError("?"), "DENIED_BY_UNKNOWN_FAIL", "Traceback: ArithmeticError: ?"),
])
def test_failure_of_the_chainer_becomes_a_verdict(serve, problem, verdict, line):
    with serve(PlugProxy, failure=problem) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == verdict
    assert session.log.find(line)[0].session == session.session.session_id


def test_dac_exception_is_reported_as_event(serve):
    class Notified(PlugProxy):
        events = []

        def notifyEvent(self, event, params):
            self.events.append((event, params))

    with serve(Notified, failure=DACException("x")) as session:
        session.wait_for_end()
    assert Notified.events == [("core.dac_exception", [])]


class ToHost(PlugProxy):
    """An engine that was told the same or other targets, one after the other."""

    targets = (("good.example", 80), ("good.example", 80))
    connected = ()

    def setServerAddress(self, host, port):
        return FALSE if host == "bad.example" else 1

    def _engine_main(self):
        type(self).connected = [self._connect_server(*target) for target in self.targets]


def test_target_refused_by_set_server_address_is_not_contacted(serve):
    class Refused(ToHost):
        targets = (("bad.example", 80),)

    with serve(Refused) as session:
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
        assert session.chainer.asked == 0
        assert session.session.connect_hint == ("bad.example", 80)
    assert Refused.connected == [False]


def test_second_request_for_the_same_target_uses_the_connection(serve):
    with serve(ToHost) as session:
        session.wait_for_end()
    assert ToHost.connected == [True, True]
    assert session.chainer.asked == 1
    assert session.log.find("Using already established server connection;")[0].level == 6


def test_second_request_for_another_target_never_reaches_the_first(serve):
    class Other(ToHost):
        targets = (("good.example", 80), ("other.example", 80))

    with serve(Other) as session:
        session.wait_for_end()
    assert session.chainer.asked == 2


def test_successful_retry_takes_back_the_verdict(serve):
    class Retrying(PlugProxy):
        def _engine_main(self):
            chainer = self.session.chainer
            good, chainer.address = chainer.address, ("127.0.0.1", 1)
            assert not self._connect_server()
            chainer.address = good
            assert self._connect_server()

    with serve(Retrying) as session:
        assert session.verdict == "ACCEPTED"


def test_connect_server_that_raises_is_not_connected(serve):
    class Raising(PlugProxy):
        def connectServer(self):
            raise KeyError("k")

    with serve(Raising) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == "DENIED_BY_UNKNOWN_FAIL"
    assert "Traceback: KeyError: 'k'" in session.log.texts("core.error")


@pytest.mark.parametrize(("answer", "verdict"), [
    (None, "DENIED_BY_CONNECTION_FAIL"), (5, "INVALID_POLICY_CALL"), ("stream", "INVALID_POLICY_CALL"),
])
def test_connect_server_must_give_a_stream(serve, answer, verdict):
    class Wrong(PlugProxy):
        def connectServer(self):
            return answer

    with serve(Wrong) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == verdict


def test_old_call_with_host_and_port_is_accepted(serve):
    class Old(PlugProxy):
        def connectServer(self, *hint):
            return PlugProxy.connectServer(self, "", 0)

    with serve(Old) as session:
        session.client.sendall(b"x")
        assert session.server.recv(1) == b"x"


# stop request

@pytest.mark.parametrize("end_of_id", ["", "/plug"])
def test_stop_request_ends_a_waiting_session(serve, end_of_id):
    with serve(PlugProxy) as session:
        session.client.sendall(b"x")
        assert session.server.recv(1) == b"x"
        # when its stop is requested, by the id of the session or of the proxy
        wanted = session.session.session_id if end_of_id else session.master.session_id
        assert running.stop_session(wanted) == 1
        # then both peers see the end
        assert ended(session.client)
        assert ended(session.server)
        session.wait_for_end()
    line = session.log.find("User initiated proxy termination request received;")[0]
    assert (line.tag, line.level) == ("core.info", 2)
    assert "info='stopped by administrator'" in session.log.find("Connection summary;")[0].text


def test_stop_request_for_another_session_changes_nothing(serve):
    with serve(PlugProxy) as session:
        assert session.server is not None
        assert running.stop_session(session.master.session_id + "1") == 0
        session.client.sendall(b"x")
        assert session.server.recv(1) == b"x"


def test_stop_request_interrupts_a_pending_connect(serve):
    class Attempt:
        aborted = False

        def abort(self):
            self.aborted = True

    attempt = Attempt()

    class Connecting(PlugProxy):
        def connectServer(self):
            self.set_connecting(attempt)
            self.request_stop()
            self.set_connecting(None)

    with serve(Connecting) as session:
        session.wait_for_end()
    assert attempt.aborted


def test_connect_that_begins_after_the_stop_request_is_interrupted(serve):
    class Attempt:
        aborted = False

        def abort(self):
            self.aborted = True

    attempt = Attempt()
    with serve(PlugProxy, start=False) as session:
        session.proxy.request_stop()
        session.proxy.set_connecting(attempt)
        session.start()
        session.wait_for_end()
        assert session.chainer.asked == 0
    assert attempt.aborted


def test_request_stop_of_a_finished_proxy_does_nothing(serve):
    with serve(PlugProxy) as session:
        session.client.close()
        session.wait_for_end()
        session.proxy.request_stop()


def test_stop_request_reaches_children(serve):
    with serve(PlugProxy) as session:
        child = types.SimpleNamespace(stopped=False)
        child.request_stop = lambda: setattr(child, "stopped", True)
        session.proxy.add_child(child)
        session.proxy.request_stop()
        session.wait_for_end()
    assert child.stopped


def test_children_of_a_finished_parent_are_nobodys(serve):
    with serve(PlugProxy) as session:
        session.client.close()
        session.wait_for_end()
        session.proxy.add_child(session.proxy)
        session.proxy.drop_child(session.proxy)
    assert session.proxy._children == ()


# what is not built is refused

class WithTls(PlugProxy):
    def config(self):
        self.encryption_policy = "tls"


class WithTlsUnchecked(WithTls):
    def __post_config__(self):
        pass


class WithOldTls(PlugProxy):
    def config(self):
        self.ssl.client_keypair_files = ("cert.pem", "key.pem")
        self.ssl.client_connection_security = 1


@pytest.mark.parametrize("proxy_class", [WithTls, WithTlsUnchecked, WithOldTls])
def test_tls_is_refused(serve, proxy_class):
    with serve(proxy_class) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
        assert not session.server_was_contacted
    assert session.log.find("Policy cannot be used; error='TLS is not built")[0].level == 1


@pytest.mark.parametrize("service", [{"encryption_policy": "tls"}, {"authentication_policy": "auth"},
                                     {"auth_policy": "auth"}])
def test_service_with_what_is_not_built_is_refused(serve, service):
    with serve(PlugProxy, **service) as session:
        assert session.client.recv(1) == b""
        assert not session.server_was_contacted
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_old_tls_settings_that_switch_nothing_on_are_harmless(serve):
    class Plain(PlugProxy):
        def config(self):
            self.ssl.client_connection_security = 0
            self.ssl.handshake_timeout = 5000

    with serve(Plain) as session:
        session.client.sendall(b"x")
        assert session.server.recv(1) == b"x"


# small methods

class Idle(PlugProxy):
    """Runs a function of the test in its main loop."""

    todo = None
    result = None

    def _engine_main(self):
        type(self).result = type(self).todo(self)


def in_session(serve, todo):
    """Return what `todo(proxy)` gives in the WORKING state, and the session."""
    proxy_class = type("One", (Idle,), {"todo": staticmethod(todo)})
    with serve(proxy_class) as session:
        session.wait_for_end()
    return proxy_class.result, session


def test_user_authenticated_fills_session_and_log(serve):
    (), session = in_session(serve, lambda proxy: proxy.userAuthenticated("joe", ["staff"], "inband") or ())
    assert (session.master.auth_user, session.master.auth_groups) == ("joe", ("staff",))
    assert session.session.auth_info == "inband"
    line = session.log.find("User authentication successful; entity='joe', auth_info='inband'")[0]
    assert (line.tag, line.level) == ("core.auth", 3)


def test_user_authenticated_in_the_form_of_two_arguments(serve):
    _, session = in_session(serve, lambda proxy: proxy.userAuthenticated("joe", "cached"))
    assert (session.master.auth_groups, session.session.auth_info) == ((), "cached")


def test_read_pem_gives_the_text(serve, tmp_path):
    file = tmp_path / "key.pem"
    file.write_bytes(b"-----BEGIN\n\xe1\n")
    text, session = in_session(serve, lambda proxy: proxy.readPEM(str(file)))
    assert text == "-----BEGIN\n\xe1\n"
    assert session.log.find(f"Reading PEM file; filename='{file}'")


def test_hooks_of_the_commercial_edition_are_harmless(serve):
    result, _ = in_session(serve, lambda proxy: (
        proxy.notifyEvent("x", []), proxy.getCredentials("password", "joe", "", "host", 22),
        proxy._hasMethod(proxy, "config"), proxy._hasMethod(PlugProxy.__new__(Asking), "policy")))
    assert result == (None, (), False, True)
