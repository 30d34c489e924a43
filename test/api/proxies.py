"""Checks of proxies: engine attributes with their defaults and permissions, aliases, presets.

Theory of operation
    A proxy's attributes answer differently at config time and at run time, so each question is
    asked from inside: a subclass of the proxy runs its whole life over socket pairs, with the
    question in config() or in startup(), the first moment of run time.  startup() then raises,
    so the main loop never runs.  What the question finds is raised again out here.

    Refused access is visible in two ways, and both are checked: the engine's value is
    unchanged, and the log says `Attribute cannot be written` or `... cannot be read`.

    core_attributes counts where it differs from the documented attributes: that is what ran.
"""

from __future__ import annotations

import contextlib
import socket

from test.api.walk import Check, Differs, member, module_of
from test.support import api
from test.support.logged import captured_log
from test.support.world import policy_world

# The class to ask about the attributes that a module's engine registers: the one whose config() changes none.
ENGINES = {"AnyPy": "AbstractAnyPyProxy", "Plug": "AbstractPlugProxy", "Smtp": "AbstractSmtpProxy"}

# Proxy itself has no engine; its attributes are asked of the simplest protocol.
_CARRIER = ("Plug", "AbstractPlugProxy")

_NEW_VALUES = {"int": 77, "int8": 8, "string": "changed", "object": None}

_REFUSED_WRITE = "Attribute cannot be written; config='%d', name='%s'"
_REFUSED_READ = "Attribute cannot be read; config='%d', name='%s'"
CONFIG, RUN = "config", "run"


class _Stop(Exception):
    """The question is answered; the proxy need not go on."""


def checks(module):
    """Yield the attribute and preset checks of one module."""
    facts = api.load(module)
    for name, variants in facts.get("core_attributes", {}).items():
        yield from _attribute_checks(module, name, api.newest(variants))
    for name, variants in facts.get("core_tls_attributes", {}).items():
        yield from _tls_checks(module, name, variants)
    for class_name, entry in facts.get("classes", {}).items():
        if entry.get("kind") != "proxy":
            continue
        for name, variants in entry.get("instance_attributes", {}).items():
            variant = api.newest(variants)
            yield Check(module, "attribute", f"{class_name}.{name} at config time",
                        lambda class_name=class_name, name=name, variant=variant:
                        _python_attribute(module, class_name, name, variant))
        for method, variants in entry.get("presets", {}).items():
            for change in api.newest(variants)["sets"]:
                yield Check(module, "preset", f"{class_name}.{method} {_text(change)}",
                            lambda class_name=class_name, method=method, change=change:
                            _preset(module, class_name, method, change))


def _text(change):
    return " ".join(str(part).replace("'", "") for part in change)


# ---------------------------------------------------------------------------- asking from inside

def ask(module, class_name, when, question):
    """Run a proxy and return question(proxy, logged) as asked at config or at run time.

    What the question raises is raised here.
    """
    answers = []

    def answer(proxy):
        try:
            answers.append((question(proxy, logged), None))
        except Exception as problem:
            answers.append((None, problem))

    base = member(module, class_name)

    def config(self):
        base.config(self)
        if when == CONFIG:
            answer(self)

    def startup(self):
        if when == RUN:
            answer(self)
        raise _Stop("asked")

    asked = type(f"Asked{class_name}", (base,), {"config": config, "startup": startup})
    with policy_world() as names, captured_log() as logged, contextlib.ExitStack() as sockets:
        ends = [sockets.enter_context(end) for end in socket.socketpair()]
        service = names["Service"]("svc", asked)
        _run(asked, service, names, ends[0])
    if not answers:
        raise Differs(f"{when} was never reached; log: {logged.texts()[-3:]}")
    result, problem = answers[0]
    if problem is not None:
        raise problem
    return result


def _run(proxy_class, service, names, client):
    session_module = module_of("Session")
    address = names["SockAddrInet"]("127.0.0.1", 1)
    stream = module_of("Stream").Stream(client.dup(), "client")
    listen = names["DBSockAddr"](address, names["ZD_PROTO_TCP"])
    master = session_module.MasterSession(service, stream, address, listen, address)
    session = session_module.StackedSession(master, service.chainer)
    session.client_stream = stream
    proxy_class(session).run()


# ------------------------------------------------------------------------------------- attributes

def _attribute_checks(module, name, facts):
    where = _CARRIER if module == "Proxy" else (module, ENGINES[module])
    if "default" in facts:
        yield Check(module, "default", f"attribute {name}", lambda: _has_default(where, name, facts))
    for when, key in ((CONFIG, "conftime"), (RUN, "runtime")):
        for letter, act in (("r", _reading), ("w", _writing)):
            word = "may" if letter in facts[key] else "may not"
            verb = "read" if letter == "r" else "written"
            yield Check(module, "attribute", f"{name} {word} be {verb} at {when} time",
                        lambda act=act, when=when, allowed=letter in facts[key]:
                        act(where, name, facts, when, allowed))
    if "alias_of" in facts:
        yield Check(module, "attribute", f"{name} is {facts['alias_of']}",
                    lambda: _is_alias(where, name, facts["alias_of"]))


def _has_default(where, name, facts):
    expected = facts["default"]
    when = CONFIG if "r" in facts["conftime"] else RUN
    actual = ask(*where, when, lambda proxy, logged: getattr(proxy, name))
    if expected == "computed":
        return
    if isinstance(expected, bool):
        expected = int(expected)
    if actual != expected:
        raise Differs(f"default of {name} is {actual!r}, was {expected!r}")


def _reading(where, name, facts, when, allowed):
    def question(proxy, logged):
        missing = object()
        getattr(proxy, name, missing)
        return logged.has(_REFUSED_READ, (int(when == CONFIG), name))

    if ask(*where, when, question) == allowed:
        raise Differs(f"{name} {'cannot' if allowed else 'can'} be read at {when} time")


def _writing(where, name, facts, when, allowed):
    value = _NEW_VALUES.get(facts["type"], 78)

    def question(proxy, logged):
        setattr(proxy, name, value)
        refused = logged.has(_REFUSED_WRITE, (int(when == CONFIG), name))
        # a value that cannot be read now would come from the plain attribute that a refused write leaves
        readable = "r" in facts["conftime" if when == CONFIG else "runtime"] and "alias_of" not in facts
        return refused, (getattr(proxy, name) == value) == allowed or not readable

    refused, right = ask(*where, when, question)
    if refused == allowed:
        raise Differs(f"writing {name} at {when} time was {'refused' if refused else 'accepted'}")
    if not right:
        raise Differs(f"{name} does not read as it should after {value!r} was written at {when} time")


def _is_alias(where, name, target):
    def question(proxy, logged):
        setattr(proxy, name, 55)
        through_alias = getattr(proxy, target)
        setattr(proxy, target, 66)
        return through_alias, getattr(proxy, name)

    if ask(*where, CONFIG, question) != (55, 66):
        raise Differs(f"{name} and {target} are two attributes")


def _tls_checks(module, name, variants):
    holders = {"ssl": ("3.9.0", "3.9.8", "5.0.0"), "tls": ("6.0.11", "7.0.4", "7.0.7")}
    for holder, releases in holders.items():
        mine = [variant for variant in variants if set(variant["versions"]) & set(releases)]
        if not mine:
            continue
        subject = name if name in holders else f"{holder}.{name}"
        if name in holders and name != holder:
            continue
        yield Check(module, "attribute", f"{subject} exists",
                    lambda subject=subject: ask(*_CARRIER, CONFIG, lambda proxy, logged: _dotted(proxy, subject)))


def _dotted(thing, names):
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


def _python_attribute(module, class_name, name, variant):
    where = _CARRIER if (module, class_name) == ("Proxy", "Proxy") else (module, class_name)
    value = ask(*where, CONFIG, lambda proxy, logged: getattr(proxy, name))
    if "value" not in variant or name == "proxy_started":        # reads 1 from config time on
        return
    expected = variant["value"]
    if expected in ({}, []):
        if len(value):
            raise Differs(f"{name} is {value!r}, was empty")
    elif value != expected:
        raise Differs(f"{name} is {value!r}, was {expected!r}")


# ---------------------------------------------------------------------------------------- presets

def _preset(module, class_name, method, change):
    """What a predefined class's method leaves behind: an attribute, or an entry of a table."""
    home = vars(module_of(module))
    where = _CARRIER if module == "Proxy" else (module, _concrete(class_name))
    *path, wanted = change

    def question(proxy, logged):
        if method not in ("config", "__post_config__"):          # those have just run by themselves
            getattr(proxy, method)()
        value = getattr(proxy, path[0])
        if len(path) == 2:
            value = value[tuple(path[1]) if isinstance(path[1], list) else path[1]]
        return value, _resolved(wanted, home, proxy)

    actual, expected = ask(*where, RUN if method == "__post_config__" else CONFIG, question)
    if isinstance(expected, tuple):
        actual = tuple(actual)
    if actual not in (expected, (expected,)):
        raise Differs(f"{_text(change)}: is {actual!r}")


def _concrete(class_name):
    """The class whose config() calls the presets of an abstract one."""
    return class_name.replace("Abstract", "", 1) if class_name.startswith("Abstract") else class_name


def _resolved(value, home, proxy):
    if isinstance(value, list):
        return tuple(_resolved(item, home, proxy) for item in value)
    if isinstance(value, str) and value.startswith("self."):
        return getattr(proxy, value[5:])
    if isinstance(value, str) and value in home:
        return home[value]
    return value
