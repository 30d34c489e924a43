"""Services: arguments of every release, what is refused at load, limits."""

import threading

import pytest

from Zorp.Exceptions import LimitException, PolicyError

from test.support.logged import captured_log
from test.support.world import policy_world


@pytest.fixture
def world():
    """The names of a policy, as attributes."""
    class Names:
        pass
    with policy_world() as names:
        world = Names()
        world.__dict__.update(names)
        yield world


# ------------------------------------------------------------------ defaults and forms

def test_defaults(world):
    service = world.Service("web", world.PlugProxy)
    assert isinstance(service.router, world.TransparentRouter)
    assert isinstance(service.chainer, world.ConnectChainer)
    assert isinstance(service.resolver_policy, world.DNSResolver)
    assert (service.snat_policy, service.dnat_policy, service.authentication_policy) == (None, None, None)
    assert (service.encryption_policy, service.limit_target_zones_to) == (None, None)
    assert (service.max_instances, service.max_sessions, service.num_instances) == (0, 1, 0)
    assert (service.auth_name, service.keepalive, service.start_time) == ("web", 0, 0)
    assert str(service) == service.name == "web"
    assert world.Globals.services["web"] is service


def test_module_defaults_fill_in_what_is_not_given(world, monkeypatch):
    import Zorp.Service as module
    router, chainer = world.InbandRouter(), world.FailoverChainer()
    monkeypatch.setattr(module, "default_router", router)
    monkeypatch.setattr(module, "default_chainer", chainer)
    monkeypatch.setattr(module, "default_snat", world.StaticNAT(addr=world.SockAddrInet("192.0.2.1", 0)))
    service = world.Service("web", world.PlugProxy)
    assert (service.router, service.chainer) == (router, chainer)
    assert service.snat_policy is world.Globals.nat_policies["__web-snat"]
    explicit = world.TransparentRouter()
    assert world.Service("other", world.PlugProxy, router=explicit).router is explicit


def test_release_1_form_brings_its_own_router(world):
    # given Service(name, chainer, proxy class)
    chainer = world.DirectedChainer(world.SockAddrInet("192.0.2.80", 80))
    service = world.Service("web", chainer, world.PlugProxy)
    # then the chainer decides on the target
    assert service.proxy_class is world.PlugProxy
    assert service.chainer is chainer
    assert service.router is chainer


def test_release_1_form_takes_a_router_behind_the_proxy_class(world):
    router = world.TransparentRouter()
    service = world.Service("web", world.ConnectChainer(), world.PlugProxy, router)
    assert service.router is router


def test_third_positional_is_the_router(world):
    router = world.TransparentRouter()
    assert world.Service("web", world.PlugProxy, router).router is router


def test_policies_are_found_by_name(world):
    nat = world.NATPolicy("mapping", world.GeneralNAT([(world.InetSubnet("10.0.0.0/8"),) * 3]))
    resolver = world.ResolverPolicy("dns", world.DNSResolver())
    service = world.Service("web", world.PlugProxy, snat_policy="mapping", dnat_policy="mapping",
                            resolver_policy="dns")
    assert service.snat_policy is service.dnat_policy is nat
    assert service.resolver_policy is resolver


def test_inline_nat_becomes_a_policy(world):
    nat = world.StaticNAT(addr=world.SockAddrInet("192.0.2.1", 0))
    service = world.Service("web", world.PlugProxy, snat=nat, dnat=nat)
    assert service.snat_policy.nat is nat
    assert service.snat_policy is world.Globals.nat_policies["__web-snat"]
    assert service.dnat_policy is world.Globals.nat_policies["__web-dnat"]


def test_keepalive_of_the_class_counts_unless_given(world):
    class Careful(world.Service):
        keepalive = 2
    assert Careful("a", world.PlugProxy).keepalive == 2
    assert Careful("b", world.PlugProxy, keepalive=3).keepalive == 3
    assert Careful("c", world.PlugProxy, keepalive=0).keepalive == 2


def test_a_single_zone_name_is_one_zone(world):
    world.Zone("off", "10.0.0.0/8")
    assert world.Service("web", world.PlugProxy, limit_target_zones_to="off").limit_target_zones_to == ("off",)


# ------------------------------------------------------------------ refused at load

REFUSED = {
    "duplicate": (lambda w: [w.Service("web", w.PlugProxy), w.Service("web", w.PlugProxy)], "Duplicate service: web"),
    "no name": (lambda w: w.Service("", w.PlugProxy), "Invalid service name"),
    "name of another kind": (lambda w: w.Service(5, w.PlugProxy), "Invalid service name"),
    "unknown snat": (lambda w: w.Service("x", w.PlugProxy, snat_policy="nosuch"),
                     "No such NAT policy; policy='nosuch', service='x'"),
    "unknown dnat": (lambda w: w.Service("x", w.PlugProxy, dnat_policy="nosuch"),
                     "No such NAT policy; policy='nosuch', service='x'"),
    "unknown resolver": (lambda w: w.Service("x", w.PlugProxy, resolver_policy="nosuch"),
                         "No such resolver policy; policy='nosuch', service='x'"),
    "unknown authentication": (lambda w: w.Service("x", w.PlugProxy, authentication_policy="nosuch"),
                               "No such authentication policy; policy='nosuch', service='x'"),
    "unknown auth": (lambda w: w.Service("x", w.PlugProxy, auth="nosuch"),
                     "No such authentication policy; policy='nosuch', service='x'"),
    "unknown authorization": (lambda w: w.Service("x", w.PlugProxy, authorization_policy="nosuch"),
                              "No such authorization policy; policy='nosuch', service='x'"),
    "unknown encryption": (lambda w: w.Service("x", w.PlugProxy, encryption_policy="nosuch"),
                           "No such encryption policy; name='nosuch', service='x'"),
    "unknown zone": (lambda w: w.Service("x", w.PlugProxy, limit_target_zones_to=["nosuch"]),
                     "No zone was defined with that name; zone='nosuch', service='x'"),
    "both snat": (lambda w: w.Service("x", w.PlugProxy, snat_policy="a", snat=w.ForgeClientSourceNAT()),
                  "Cannot set both snat and snat_policy"),
    "both dnat": (lambda w: w.Service("x", w.PlugProxy, dnat_policy="a", dnat=w.ForgeClientSourceNAT()),
                  "Cannot set both dnat and dnat_policy"),
    "both auth": (lambda w: w.Service("x", w.PlugProxy, authentication_policy="a", auth_policy="b"),
                  "Cannot set authentication_policy and auth or auth_policy"),
    "router first": (lambda w: w.Service("x", w.TransparentRouter(), w.PlugProxy),
                     "the order is Service(name, proxy_class, router)"),
    "no proxy class": (lambda w: w.Service("x", None), "Service without a proxy class; service='x'"),
    "class that is no proxy": (lambda w: w.Service("x", int), "Service without a proxy class; service='x'"),
    "router class": (lambda w: w.Service("x", w.PlugProxy, router=w.TransparentRouter), "Invalid router; service='x'"),
    "chainer of another kind": (lambda w: w.Service("x", w.PlugProxy, chainer=5), "Invalid chainer; service='x'"),
    "negative limit": (lambda w: w.Service("x", w.PlugProxy, max_instances=-1), "Invalid max_instances; service='x'"),
    "limit as text": (lambda w: w.Service("x", w.PlugProxy, max_sessions="5"), "Invalid max_sessions; service='x'"),
    "bad keepalive": (lambda w: w.Service("x", w.PlugProxy, keepalive=4), "Invalid keepalive; service='x'"),
    "packet service with inband router": (lambda w: w.PFService("x", router=w.InbandRouter()),
                                          "Invalid router type specified for port forwarded service"),
    "packet service with two targets": (
        lambda w: w.PFService("x", w.DirectedRouter([w.SockAddrInet("192.0.2.1", 1), w.SockAddrInet("192.0.2.2", 1)])),
        "DirectedRouter with more than one destination address not supported by KZorp"),
    "packet service with wrong nat": (
        lambda w: [w.NATPolicy("n", w.HashNAT({})), w.PFService("x", snat_policy="n")],
        "NAT class does not support KZorp representation"),
    "deny code of IPv6 for IPv4": (lambda w: w.DenyService("x", ipv6_setting=6), "Invalid ipv6_setting"),
    "deny code out of range": (lambda w: w.DenyService("x", ipv4_setting=9), "Invalid ipv4_setting"),
}


@pytest.mark.parametrize(("declare", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_at_load(world, declare, text):
    with pytest.raises(PolicyError) as refused:
        declare(world)
    assert text in str(refused.value)


def test_refused_service_does_not_stay_registered(world):
    with pytest.raises(PolicyError):
        world.Service("x", world.PlugProxy, resolver_policy="nosuch")
    assert "x" not in world.Globals.services


# ------------------------------------------------------------------ other kinds

def test_own_service_class_qualifies(world):
    from Zorp.Service import AbstractService

    class Own(AbstractService):
        pass
    service = Own("own")
    assert world.Globals.services["own"] is service
    with pytest.raises(NotImplementedError):
        service.startInstance(None)
    with pytest.raises(NotImplementedError):
        service.stopInstance(None)


def test_deny_codes(world):
    assert [int(code) for code in (world.DenyIPv4.DROP, world.DenyIPv4.TCP_RESET, world.DenyIPv4.ICMP_ADMIN_PROHIBITED,
                                   world.DenyIPv6.ICMP_PORT_UNREACHABLE)] == [0, 1, 8, 5]
    assert world.DenyIPv4.to_string(world.DenyIPv4.ICMP_NET_PROHIBITED) == "ICMP_NET_PROHIBITED"
    assert world.DenyIPv6.to_string(2) == "ICMP_NO_ROUTE"
    service = world.DenyService("no", logging=False, ipv4_setting=1, ipv6_setting=world.DenyIPv6.TCP_RESET)
    assert (service.ipv4_setting, service.ipv6_setting, service.logging) == (1, 1, False)


# ------------------------------------------------------------------ limits

def test_limit_test_and_count_are_one_step():
    from Zorp.Service import RunningInstances
    # given a limit of ten and fifty threads that enter at the same moment
    running, barrier, entered, refused = RunningInstances(), threading.Barrier(50), [], []

    def enter():
        barrier.wait()
        try:
            running.enter(10)
            entered.append(1)
        except LimitException as problem:
            refused.append(str(problem))
    threads = [threading.Thread(target=enter) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # then ten get in, and when one leaves another one can
    assert (len(entered), running.number) == (10, 10)
    assert set(refused) == {"Limit error: Instance limit reached"}
    running.leave()
    running.enter(10)
    assert running.number == 10


def test_stop_of_a_session_that_never_counted_changes_nothing(world):
    class Session:
        started = 0
        session_id = "svc/x:0"
    service = world.Service("x", world.PlugProxy)
    with captured_log() as logged:
        service.stopInstance(Session())
    assert service.num_instances == 0
    assert not logged.find("Ending proxy instance")
