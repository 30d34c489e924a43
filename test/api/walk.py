"""Checks of the new package against the API of the old releases: one Check per fact.

Theory of operation
    checks(module) yields what can be asked about one policy module: its names, the bases of its
    classes, every constructor and function form that any release had, defaults, constants, and
    the names its star import also delivers.  test/api/proxies.py adds attributes and presets,
    test/api/objects.py what needs a living object.  A check raises when the fact does not hold;
    nothing else is an answer.  Who runs the checks decides what a failure means: the tests
    compare them with the list of open ones, the report counts.

What "the new package is the union of all releases" means here
    names        every name that any release had is there
    constructors a call written for any release binds: all its keywords are known, and for the
                 newest release the positional order too.  Where releases order positions
                 differently, test/api/test_forms.py calls each form.
    functions,   take as many positional arguments as in any release, and the newest release's
    methods      keywords
    defaults,    those of the newest release
    constants
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from test.support import api


@dataclass(frozen=True)
class Check:
    """One question about the package; run() returns when the answer is yes and raises when not."""

    module: str
    kind: str               # one of KINDS
    subject: str
    run: Callable[[], object]

    def __str__(self):
        return f"{self.module} {self.kind} {self.subject}"

    def problem(self):
        """Return why the fact does not hold, as one line, or None when it does."""
        try:
            self.run()
        except Exception as reason:
            text = str(reason).strip().splitlines()
            return f"{type(reason).__name__}: {text[0] if text else 'no text'}"
        return None


KINDS = ("name", "base", "form", "default", "constant", "reexport", "object", "attribute", "preset")


# Python 2's protocol methods by what they are called today.  __del__ is not asked for: the
# interpreter called it, policies did not, and here the end of a life is explicit.
_PROTOCOL = {"__cmp__": "__lt__", "__nonzero__": "__bool__"}
_NOT_FOR_POLICIES = {"__del__"}


class Differs(AssertionError):
    """The package has the thing, but another one than the old releases."""


def module_of(name):
    """Import Zorp.<name>; after Zorp.Core, as in every policy, so that star names are in place."""
    importlib.import_module("Zorp.Core")
    return importlib.import_module("Zorp" if name == "__init__" else f"Zorp.{name}")


def member(module, dotted):
    """Return a name of a module, which may have dots (`config.options.language`)."""
    value = module_of(module)
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def checks(module):
    """Yield every check that the data allows for one module."""
    facts = api.load(module)
    yield Check(module, "name", "(module)", lambda: module_of(module))
    for name, entry in facts.get("classes", {}).items():
        yield from _class_checks(module, name, entry)
    for name, entry in facts.get("functions", {}).items():
        yield from _function_checks(module, name, entry)
    yield from _constant_checks(module, facts)
    yield from _reexport_checks(module, facts)


# ---------------------------------------------------------------------------- classes and functions

def _class_checks(module, name, entry):
    yield Check(module, "name", name, lambda: _is_class(member(module, name), entry))
    if "alias_of" in entry:
        yield Check(module, "base", f"{name} is {entry['alias_of']}",
                    lambda: _same(member(module, name), member(module, entry["alias_of"])))
    for base in sorted({base for variant in entry.get("bases", ()) for base in variant["value"]}):
        yield Check(module, "base", f"{name}({base})", lambda base=base: _is_subclass(module, name, base))
    if "replaced_by_core" not in entry:           # its function form is the one that counts
        yield from _form_checks(module, f"{name}.__init__", entry.get("init", ()),
                                lambda: _constructor(member(module, name)), every_keyword=True)
    for attribute, variants in entry.get("class_attributes", {}).items():
        subject = f"{name}.{attribute}"
        yield Check(module, "constant", subject,
                    lambda variants=variants, subject=subject: _has_value(module, subject, api.newest(variants)))
    for method, variants in entry.get("methods", {}).items():
        if method not in _NOT_FOR_POLICIES:
            yield from _method_checks(module, f"{name}.{_PROTOCOL.get(method, method)}", variants)


def _method_checks(module, subject, variants):
    decorators = {decorator for variant in variants for decorator in variant.get("decorators", ())}
    if decorators & {"property"} or any(decorator.endswith(".setter") for decorator in decorators):
        yield Check(module, "name", subject, lambda: member(module, subject))
        return
    yield Check(module, "name", subject, lambda: _is_callable(member(module, subject)))
    own_self = [] if "staticmethod" in decorators or "classmethod" in decorators else [["self"]]
    for variant in variants:
        yield Check(module, "form", f"{subject} {_releases(variant)}",
                    lambda variant=variant: _accepts_positional(
                        inspect.signature(member(module, subject)), own_self + variant["params"]))
    last = api.newest(variants)
    yield Check(module, "form", f"{subject} keywords",
                lambda: _accepts_keywords(inspect.signature(member(module, subject)), last["params"]))
    yield from _default_checks(module, subject, last, lambda: inspect.signature(member(module, subject)))


def _function_checks(module, name, entry):
    yield Check(module, "name", f"{name}()", lambda: _is_callable(member(module, name)))
    yield from _form_checks(module, name, entry["sig"], lambda: _signature(member(module, name)), every_keyword=False)


def _form_checks(module, subject, variants, signature, *, every_keyword):
    """The forms of a constructor or function: what each release wrote has to bind."""
    if not variants:
        return
    # a form may stand there twice, with and without the documented types
    different = {(_releases(variant), str(variant["params"])): variant for variant in variants}
    for variant in different.values():
        yield Check(module, "form", f"{subject} {_releases(variant)}",
                    lambda variant=variant: _accepts_keywords(signature(), variant["params"])
                    if every_keyword else _accepts_positional(signature(), variant["params"]))
    last = api.newest(variants)
    yield Check(module, "form", f"{subject} order", lambda: _has_order(signature(), last["params"]))
    yield from _default_checks(module, subject, last, signature)


def _default_checks(module, subject, variant, signature):
    for item in variant["params"]:
        if len(item) > 1:
            yield Check(module, "default", f"{subject}({item[0]})",
                        lambda item=item: _has_default(module, signature(), item))


def _releases(variant):
    first, last = variant["versions"][0], variant["versions"][-1]
    return first if first == last else f"{first}-{last}"


def _constructor(cls):
    return inspect.signature(cls)


def _signature(function):
    try:
        return inspect.signature(function)
    except ValueError:                            # some of the interpreter's own functions tell none
        return inspect.signature(lambda value: value)


def _is_class(value, entry):
    if inspect.isclass(value) or ("replaced_by_core" in entry and callable(value)):
        return
    raise Differs(f"not a class: {value!r}")


def _is_callable(value):
    if not callable(value):
        raise Differs(f"not callable: {value!r}")


def _same(one, other):
    if one is not other:
        raise Differs(f"{one!r} is not {other!r}")


def _is_subclass(module, name, base):
    owner, _, last = base.rpartition(".")
    if owner:
        parent = getattr(importlib.import_module(owner), last)
    else:
        parent = getattr(module_of(module), base, None) or getattr(builtins, base)
    if not issubclass(member(module, name), parent):
        raise Differs(f"{name} is not a {base}")


def _plain(params):
    """The named parameters of the data, without `*args` and `**kw`."""
    return [item for item in params if not item[0].startswith("*")]


def _accepts_keywords(signature, params):
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    missing = [item[0] for item in _plain(params) if item[0] not in known]
    if missing:
        raise Differs(f"unknown keywords: {', '.join(missing)}; known: {signature}")


def _accepts_positional(signature, params):
    everything = [None] * len(_plain(params))
    required = [None] * len([item for item in _plain(params) if len(item) == 1])
    signature.bind(*everything)
    signature.bind(*required)


def _has_order(signature, params):
    names = [parameter.name for parameter in signature.parameters.values()
             if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    wanted = [item[0] for item in _plain(params)]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        wanted = wanted[:len(names)]              # the rest is told apart by type: test/api/test_forms.py
    if names[:len(wanted)] != wanted:
        raise Differs(f"order is {', '.join(names)}; old policies write {', '.join(wanted)}")


def _has_default(module, signature, item):
    parameter = signature.parameters.get(item[0])
    if parameter is None:
        if any(other.kind in (other.VAR_KEYWORD, other.VAR_POSITIONAL) for other in signature.parameters.values()):
            return                                # optional, and test/api/test_forms.py shows its effect
        raise Differs(f"no parameter {item[0]}")
    if parameter.default is parameter.empty:
        raise Differs(f"{item[0]} has no default")
    expected = item[2] if len(item) == 3 else _value_of(module, item[1])
    if not _equal(parameter.default, expected):
        raise Differs(f"default of {item[0]} is {parameter.default!r}, was {expected!r}")


def _value_of(module, text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return eval(text, dict(vars(module_of(module))))     # a constant expression from our own data


# ------------------------------------------------------------------------------------------ constants

def _constant_checks(module, facts):
    for name, variants in facts.get("constants", {}).items():
        yield Check(module, "constant", name,
                    lambda name=name, variants=variants: _has_value(module, name, api.newest(variants)))
    known = facts.get("constants", {}).keys() | {
        name for variants in facts.get("reexports", {}).values() for name in api.exported(variants)}
    for enum, variants in facts.get("enums", {}).items():
        for item in sorted({item for variant in variants for item in variant["items"]} & known):
            yield Check(module, "constant", f"{enum} {item}", lambda item=item: member(module, item))
    for name, variants in facts.get("action_tuples", {}).items():
        for action in sorted({action for variant in variants for action in variant["actions"]} & known):
            yield Check(module, "constant", f"{name} {action}", lambda action=action: member(module, action))


def _has_value(module, name, variant):
    actual, expected = member(module, name), variant["value"]
    if isinstance(expected, dict) and len(expected) == 1:
        (how, what), = expected.items()
        if how in _SPECIAL:
            _SPECIAL[how](module, name, actual, what)
            return
    if expected == "computed" or (isinstance(expected, str) and _filled_in_at_build_time(expected)):
        return
    if name.endswith(("deprecated_warning", "dispatch_id")):      # change with use
        return
    if expected in ({}, []):                      # a registry: what it holds is the policy's
        expected, actual = type(expected), type(actual)
    if not _equal(actual, expected):
        raise Differs(f"{name} is {actual!r}, was {expected!r}")


def _filled_in_at_build_time(text):
    return text.startswith("@") or text.startswith("ZORP_")


def _is_method_alias(module, name, actual, method):
    owner = name.rpartition(".")[0]
    _same(inspect.unwrap(actual), inspect.unwrap(member(module, f"{owner}.{method}")))


def _is_enum(module, name, actual, items):
    for item, value in items.items():
        if not _equal(int(getattr(actual, item)), value):
            raise Differs(f"{name}.{item} is {getattr(actual, item)!r}, was {value!r}")


def _is_pattern(module, name, actual, arguments):
    if actual.pattern != arguments[0]:
        raise Differs(f"{name} matches {actual.pattern!r}, was {arguments[0]!r}")


def _is_config(module, name, actual, what):
    _same(actual, importlib.import_module(what).config)


_SPECIAL = {"method": _is_method_alias, "enum": _is_enum, "re.compile": _is_pattern, "module": _is_config}


def _equal(actual, expected):
    """True when two values are the same to a policy: a list may be a tuple, a truth value a number."""
    if isinstance(expected, (list, tuple)):
        return isinstance(actual, (list, tuple)) and list(actual) == list(expected)
    if isinstance(expected, int) and isinstance(actual, int):
        return int(actual) == int(expected)
    return actual == expected


# ----------------------------------------------------------------------------------------- re-exports

def _reexport_checks(module, facts):
    for origin, variants in facts.get("reexports", {}).items():
        for name in api.exported(variants):
            yield Check(module, "reexport", f"{name} of {origin}",
                        lambda origin=origin, name=name: _is_delivered(module, origin, name))


def _is_delivered(module, origin, name):
    here = module_of(module)
    value = getattr(here, name)
    if name not in getattr(here, "__all__", (name,)):
        raise Differs(f"a star import does not deliver {name}")
    if getattr(value, "__module__", None) == "Zorp.language.unbuilt":
        raise Differs(f"{name} is there only to say that it is not built")
    kind, _, other = origin.rpartition(" ")
    if kind == "module":
        expected = importlib.import_module(other)
        if value is not expected and value is not getattr(expected, "config", expected):
            raise Differs(f"{name} is {value!r}, not the module {other}")
    elif not origin.startswith("python:") and _defines(origin, name):
        expected = getattr(importlib.import_module(origin), name)
        if value is not expected and not inspect.ismodule(value) and not isinstance(value, int):
            raise Differs(f"{name} is {value!r}, not the one of {origin}")


def _defines(origin, name):
    """True when the module that used to define a name exists here and has it."""
    try:
        return hasattr(importlib.import_module(origin), name)
    except ImportError:
        return False
