"""Attributes of a proxy that its engine knows: declared as a table, checked at every access.

    class AbstractPlugProxy(Proxy):
        engine_attributes = (
            Attr("timeout", INT, CONFIG, 600_000),
            Attr("packet_stats_interval", ALIAS, CONFIG, "packet_stats_interval_packet"),
            Attr("request", HASH, READ, PolicyHash),
        )

Theory of operation
    BuiltinProxy hands every new class to install().  It merges the tables along the MRO, a
    later class replacing an entry of the same name, and puts a data descriptor on the class for
    each entry.  Descriptors win over the instance dictionary, so an attribute that the engine
    knows cannot be hidden, and they cost nothing for all other attributes; a __setattr__ of our
    own would slow down every assignment of the engine's own code too.

    A class-level assignment in a policy class (`timeout = 5000`) would replace the descriptor.
    install() puts it back in that class and keeps the value beside it as the "plain" value: what
    a policy sees before the engine exists.  It does not configure the engine.

    The values live in an EngineVars object, `proxy._vars`.  Engine code reads and writes that
    directly, without check or log.  Policy code goes through the descriptors:

        before CONFIG                   instance dictionary, then the plain value
        in CONFIG and after, allowed    the engine's value, one core.debug(6) line
        in CONFIG and after, refused    core.policy(3) line, then the instance dictionary

    A name that no table has is an ordinary attribute.  Zorp.engine.config_lint looks at
    those once config() is done.

Threads
    Tables and descriptors are made while the policy loads.  An EngineVars belongs to its proxy
    and so to one thread.

Deviations
    A value of the wrong type or out of range raises, which ends config() and the session; the
    original kept the old, often laxer value in force.  The same holds for a NUL in a text, which
    the original cut there.  A refused write is logged a second time, at core.policy(2) with the
    session id, because it looks successful to who wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from Zorp import Log
from Zorp.Constants import CORE_DEBUG, CORE_POLICY
from Zorp.Log import enabled, log

# when an attribute may be read and written: while config() runs, and later
CONFIG_R, CONFIG_W, RUN_R, RUN_W = (1 << n for n in range(4))
READ = CONFIG_R | RUN_R                          # r:r
CONFIG = READ | CONFIG_W                         # rw:r, nearly every setting
ALWAYS = CONFIG | RUN_W                          # rw:rw
RUN_READ = RUN_R                                 # -:r
RUN = RUN_R | RUN_W                              # -:rw

# kinds; the default of an Attr depends on the kind
INT = "int"                  # number; also every boolean
INT8 = "int8"
INT16 = "int16"
INT32 = "int32"              # signed or unsigned: marks are written both ways
INT64 = "int64"
STRING = "string"            # text, one character per byte
CSTRING = "cstring"          # text of at most `size` - 1 characters
OBJECT = "object"            # anything
HASH = "hash"                # default: function that makes the table
DIMHASH = "dimhash"          # default: function that makes the table
CUSTOM = "custom"            # default: function of the proxy that gives the value; `set`: function(proxy, value)
METHOD = "method"            # default: name of the engine's method
ALIAS = "alias"              # default: name of the attribute that is meant
OBSOLETE = "obsolete"        # as ALIAS, and each use is logged

_RANGES = {
    INT: (-(1 << 31), (1 << 31) - 1),
    INT8: (-(1 << 7), (1 << 8) - 1),
    INT16: (-(1 << 15), (1 << 16) - 1),
    INT32: (-(1 << 31), (1 << 32) - 1),
    INT64: (-(1 << 63), (1 << 64) - 1),
}
STATE_CONFIG = 2             # value of proxy._state while config() runs; less: before, more: after
_MISSING = object()


class Attr(NamedTuple):
    """One entry of an engine's table."""

    name: str
    kind: str
    access: int = CONFIG
    default: Any = None
    set: Callable | None = None      # CUSTOM only
    size: int = 0                    # CSTRING only
    shown: Callable = lambda proxy, value: repr(value)     # what the log says instead of the value


class EngineVars:
    """The values of one proxy's engine attributes, by name; for the engine's own code."""

    def __init__(self, values: dict) -> None:
        self.__dict__.update(values)


class Table(NamedTuple):
    """What install() found out about one class."""

    attributes: dict[str, Attr]
    values: dict[str, Any]                          # defaults that may be shared
    tables: tuple[tuple[str, Callable], ...]        # (name, maker) of HASH and DIMHASH entries

    def new_vars(self) -> EngineVars:
        """Return fresh values for one proxy."""
        made = EngineVars(self.values)
        for name, make in self.tables:
            setattr(made, name, make())
        return made


def install(cls: type, declared_by: str = "engine_attributes") -> Table:
    """Merge the tables along the MRO of `cls`, put the descriptors on it, return the merged table."""
    attributes: dict[str, Attr] = {}
    for base in reversed(cls.__mro__):
        attributes.update((attribute.name, attribute) for attribute in vars(base).get(declared_by, ()))
    for attribute in attributes.values():
        present = _class_value(cls, attribute.name)
        if not isinstance(present, EngineAttribute):
            setattr(cls, attribute.name, _DESCRIPTORS.get(attribute.kind, EngineAttribute)(attribute, present))
        elif present.attribute is not attribute:
            setattr(cls, attribute.name, _DESCRIPTORS.get(attribute.kind, EngineAttribute)(attribute, present.plain))
    stored = [attribute for attribute in attributes.values() if attribute.kind not in _WITHOUT_VALUE]
    return Table(
        attributes,
        {attribute.name: attribute.default for attribute in stored if attribute.kind not in (HASH, DIMHASH)},
        tuple((attribute.name, attribute.default) for attribute in stored if attribute.kind in (HASH, DIMHASH)))


def _class_value(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return _MISSING


class EngineAttribute:
    """The descriptor of an attribute that has a value in `proxy._vars`."""

    __slots__ = ("_accept", "attribute", "name", "plain")

    def __init__(self, attribute: Attr, plain: Any = _MISSING) -> None:
        self.attribute = attribute
        self.name = attribute.name
        self.plain = plain                     # what the class would give without an engine
        self._accept = _ACCEPT.get(attribute.kind)

    def __get__(self, proxy, owner=None):
        if proxy is None:
            return self._from_class(None, owner)
        state = proxy._state
        if state < STATE_CONFIG:
            return self._from_instance(proxy)
        if not self.attribute.access & (CONFIG_R if state == STATE_CONFIG else RUN_R):
            log(None, CORE_POLICY, 3, "Attribute cannot be read; config='%d', name='%s'",
                (state == STATE_CONFIG, self.name))
            return self._from_instance(proxy)
        value = self._fetch(proxy)
        if Log.loudest >= 6 and enabled(CORE_DEBUG, 6):
            log(proxy._session_id, CORE_DEBUG, 6, "Attribute fetched; attribute='%s', value='%s'",
                (self.name, self.attribute.shown(proxy, value)))
        return value

    def __set__(self, proxy, value):
        state = proxy._state
        if state < STATE_CONFIG:
            proxy.__dict__[self.name] = value
        elif not self._writable(state):
            for session_id, level in ((None, 3), (proxy._session_id, 2)):
                log(session_id, CORE_POLICY, level, "Attribute cannot be written; config='%d', name='%s'",
                    (state == STATE_CONFIG, self.name))
            proxy.__dict__[self.name] = value
        else:
            self._store(proxy, value)
            if Log.loudest >= 6 and enabled(CORE_DEBUG, 6):
                log(proxy._session_id, CORE_DEBUG, 6, "Attribute changed; attribute='%s', newvalue='%s'",
                    (self.name, self.attribute.shown(proxy, value)))

    def __delete__(self, proxy):
        try:
            del proxy.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def _writable(self, state: int) -> bool:
        return bool(self.attribute.access & (CONFIG_W if state == STATE_CONFIG else RUN_W))

    def _fetch(self, proxy):
        return getattr(proxy._vars, self.name)

    def _store(self, proxy, value) -> None:
        if self._accept is not None:
            try:
                value = self._accept(value, self.attribute)
            except (TypeError, ValueError) as problem:
                log(proxy._session_id, CORE_POLICY, 1, "Invalid value of attribute; attribute='%s', error='%s'",
                    (self.name, problem))
                raise
        setattr(proxy._vars, self.name, value)

    def _from_instance(self, proxy):
        try:
            return proxy.__dict__[self.name]
        except KeyError:
            return self._from_class(proxy, type(proxy))

    def _from_class(self, proxy, owner):
        if self.plain is _MISSING:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}", name=self.name)
        bind = getattr(type(self.plain), "__get__", None)
        return self.plain if bind is None else bind(self.plain, proxy, owner)


class _ComputedAttribute(EngineAttribute):
    """A value that the engine computes when it is asked for."""

    __slots__ = ()

    def _writable(self, state):
        return self.attribute.set is not None and super()._writable(state)

    def _fetch(self, proxy):
        return self.attribute.default(proxy)

    def _store(self, proxy, value):
        self.attribute.set(proxy, value)


class _TableAttribute(EngineAttribute):
    """A policy hash: its entries may be changed, the table itself cannot be replaced."""

    __slots__ = ()

    def _writable(self, state):
        return False


class _MethodAttribute(_TableAttribute):
    """A function of the engine."""

    __slots__ = ()

    def _fetch(self, proxy):
        return getattr(proxy, self.attribute.default)


class _AliasAttribute(EngineAttribute):
    """A second name; the access rules of both names hold."""

    __slots__ = ()

    def _fetch(self, proxy):
        if self.attribute.kind == OBSOLETE:
            log(None, CORE_POLICY, 3, "Fetching obsolete attribute; name='%s'", (self.name,))
        return getattr(proxy, self.attribute.default)

    def _store(self, proxy, value):
        if self.attribute.kind == OBSOLETE:
            log(None, CORE_POLICY, 3, "Changing obsolete attribute; name='%s'", (self.name,))
        setattr(proxy, self.attribute.default, value)


_DESCRIPTORS = {
    HASH: _TableAttribute, DIMHASH: _TableAttribute, METHOD: _MethodAttribute, CUSTOM: _ComputedAttribute,
    ALIAS: _AliasAttribute, OBSOLETE: _AliasAttribute,
}
_WITHOUT_VALUE = (METHOD, CUSTOM, ALIAS, OBSOLETE)


def check_number(value: Any, attribute: Attr) -> int:
    """Return the number if it fits the attribute's kind; raises TypeError or ValueError."""
    if not isinstance(value, int):
        raise TypeError(f"an integer is required for {attribute.name}, not {type(value).__name__}")
    least, most = _RANGES[attribute.kind]
    if not least <= value <= most:
        raise ValueError(f"number out of range; value='{value}', min='{least}', max='{most}'")
    return int(value)


def _text(value: Any, attribute: Attr) -> str:
    """Return the text with one character per byte; what has no byte becomes its UTF-8 bytes."""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("latin-1")
    elif not isinstance(value, str):
        raise TypeError(f"a string is required for {attribute.name}, not {type(value).__name__}")
    try:
        value.encode("latin-1")
    except UnicodeEncodeError:
        value = value.encode("utf-8").decode("latin-1")
    if "\0" in value:
        raise ValueError("NUL inside a text")
    return value[:attribute.size - 1] if attribute.kind == CSTRING and attribute.size else value


_ACCEPT = {**dict.fromkeys(_RANGES, check_number), STRING: _text, CSTRING: _text}


class AttributeStruct:
    """A container of attributes inside a proxy (`self.tls`, `encryption.settings`).

    Unlike on the proxy itself an unknown name cannot be read (`hasattr` is false), may be written
    at any time and is then an ordinary value, and a write that is not allowed now raises
    AttributeError.

    Arguments:
        attributes: Attr entries of the kinds with a value; their access flags hold.
        in_config: function that tells whether the flags for config time are the ones in force.
    """

    def __init__(self, attributes: tuple[Attr, ...], in_config: Callable[[], bool]) -> None:
        self.__dict__.update(
            _attributes={attribute.name: attribute for attribute in attributes},
            _values={attribute.name: attribute.default() if attribute.kind in (HASH, DIMHASH) else attribute.default
                     for attribute in attributes},
            _in_config=in_config)

    def _may(self, name: str, in_config: int, later: int) -> bool:
        attribute = self._attributes.get(name)
        return attribute is None or bool(attribute.access & (in_config if self._in_config() else later))

    def __getattr__(self, name):
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError("No such attribute", name=name)
        if not self._may(name, CONFIG_R, RUN_R):
            log(None, CORE_POLICY, 3, "Attribute cannot be read; config='%d', name='%s'", (self._in_config(), name))
            raise AttributeError("No such attribute", name=name)
        return values[name]

    def __setattr__(self, name, value):
        if not self._may(name, CONFIG_W, RUN_W):
            log(None, CORE_POLICY, 3, "Attribute cannot be written; config='%d', name='%s'", (self._in_config(), name))
            raise AttributeError("Error writing attribute", name=name)
        attribute = self._attributes.get(name)
        accept = _ACCEPT.get(attribute.kind) if attribute else None
        self._values[name] = accept(value, attribute) if accept else value

    def __dir__(self):
        return [name for name in self._values if self._may(name, RUN_R, RUN_R)]
