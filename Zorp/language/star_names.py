"""Names that `from Zorp.X import *` also delivers, beside what the module is about.

Theory of operation
    Up to Zorp 7 most modules began with star imports of each other, so a policy that said
    `from Zorp.Proxy import *` could use `log`, `SockAddrInet` or `types.StringType` without
    importing them, and published policies do.  Our modules import what they use and nothing
    else; the tables below say what the old ones let slip through.

    complete_loaded() fills in the names once, at the end of Zorp.Core, when every module that
    the tables draw from is loaded.  A module that policies load later (a proxy) ends with
    `complete(__name__)`.  A name that a module has itself is never replaced, and names of
    modules that are not loaded or not built stay missing.

    Nothing here may import a module of ours: low modules get names of higher ones, which
    only works from outside, after the fact.  Called by the importing thread while a policy
    loads; there is no other caller.

Deviation
    The tables are the union over the releases 3.9.0 to 7.0.7.  Libraries that no current
    Python has (`DNS`, `radix`, the kernel module's bindings) are not imitated.
"""

from __future__ import annotations

import importlib
import sys
import types

# Whole name spaces: everything public in the modules on the right.
_STARS = {
    "Zorp.AnyPy": ("Zorp.Proxy",),
    "Zorp.Cache": ("Zorp.Zorp",),
    "Zorp.Chainer": ("Zorp.Zorp",),
    "Zorp.Core": ("Zorp.Zorp",),
    "Zorp.Dispatch": ("Zorp.Exceptions", "Zorp.Zorp"),
    "Zorp.Domain": ("Zorp.Zorp",),
    "Zorp.KZorp": ("Zorp.Zorp",),
    "Zorp.Listener": ("Zorp.Dispatch",),
    "Zorp.Matcher": ("Zorp.Zorp",),
    "Zorp.NAT": ("Zorp.Zorp",),
    "Zorp.Plug": ("Zorp.Zorp",),
    "Zorp.Proxy": ("Zorp.Exceptions", "Zorp.language.unbuilt", "Zorp.Zorp"),
    "Zorp.Receiver": ("Zorp.Dispatch",),
    "Zorp.Resolver": ("Zorp.Zorp",),
    "Zorp.ResolverCache": ("Zorp.Common", "Zorp.Zorp"),
    "Zorp.Router": ("Zorp.Zorp",),
    "Zorp.Rule": ("Zorp.Zorp",),
    "Zorp.Service": ("Zorp.Zorp",),
    "Zorp.Session": ("Zorp.Exceptions", "Zorp.Zorp"),
    "Zorp.Smtp": ("Zorp.Zorp",),
    "Zorp.Stack": ("Zorp.Zorp",),
    "Zorp.Subnet": ("Zorp.Zorp",),
    "Zorp.Zone": ("Zorp.Zorp",),
}

# Single names by the module that defines them.  "." means that module itself, under its last name.
_SINGLE = {
    "Zorp.Base": {"Zorp.Subnet": "Inet6Subnet InetSubnet Subnet"},
    "Zorp.Chainer": {
        "Zorp.Cache": "TimedCache", "Zorp.Exceptions": "DACException", "Zorp.NAT": "NAT_DNAT NAT_SNAT",
        "Zorp.Session": "MasterSession StackedSession", "Zorp.SockAddr": "SockAddrInet", "Zorp.Stream": "Stream",
        "Zorp.Zone": "root_zone",
    },
    "Zorp.Dispatch": {
        "Zorp.Cache": "ShiftCache", "Zorp.Domain": "InetDomain", "Zorp.Session": "ClientInfo MasterSession",
        "Zorp.SockAddr": ". SockAddrInet SockAddrInet6", "Zorp.Subnet": "Subnet",
        "Zorp.Util": "isSequence makeSequence parseIfaceGroupAliases", "Zorp.Zone": "Zone root_zone",
        "Zorp.Zorp": ".",
    },
    "Zorp.Domain": {"Zorp.SockAddr": "SockAddrInet inet_aton inet_ntoa inet_ntop inet_pton"},
    "Zorp.FileLock": {"Zorp.Zorp": "CORE_ERROR log"},
    "Zorp.InstancesConf": {"Zorp.Instance": "Instance"},
    "Zorp.KZorp": {"Zorp.Zone": "Zone"},
    "Zorp.Matcher": {
        "Zorp.Cache": "TimedCache", "Zorp.Exceptions": "MatcherException",
        "Zorp.ResolverCache": "DNSResolver ResolverCache",
    },
    "Zorp.NAT": {
        "Zorp.Cache": "ShiftCache TimedCache", "Zorp.Domain": "InetDomain",
        "Zorp.Exceptions": "DACException LimitException UserException",
        "Zorp.SockAddr": "SockAddrInet SockAddrInet6 inet_ntoa", "Zorp.Subnet": "InetSubnet",
        "Zorp.Util": "makeSequence",
    },
    "Zorp.Plug": {"Zorp.Proxy": "Proxy"},
    "Zorp.Proxy": {
        "Zorp.Base": "BaseZone", "Zorp.Chainer": "ConnectChainer", "Zorp.Common": "TLS_ACCOUNTING",
        "Zorp.FileLock": "FileLock", "Zorp.Matcher": "getMatcher", "Zorp.Session": "MasterSession StackedSession",
        "Zorp.SockAddr": "SockAddrInet getHostByName", "Zorp.Stack": "getStackingProviderBackend",
        "Zorp.Stream": "Stream", "Zorp.Subnet": "Inet6Subnet InetSubnet Subnet",
    },
    "Zorp.Resolver": {"Zorp.SockAddr": "SockAddrInet SockAddrInet6"},
    "Zorp.Router": {"Zorp.SockAddr": "SockAddrInet"},
    "Zorp.Rule": {
        "Zorp.Dispatch": ".", "Zorp.Subnet": "Subnet", "Zorp.Util": "makeSequence parseIfaceGroupAliases",
        "Zorp.Zone": "Zone",
    },
    "Zorp.Service": {
        "Zorp.Chainer": "ConnectChainer", "Zorp.Exceptions": "LimitException",
        "Zorp.NAT": "NATPolicy NAT_DNAT NAT_SNAT getNATPolicy",
        "Zorp.Resolver": "DNSResolver ResolverPolicy getResolverPolicy",
        "Zorp.Router": "DirectedRouter TransparentRouter", "Zorp.Session": "StackedSession",
        "Zorp.Stream": "Stream", "Zorp.language.unbuilt": "AuthPolicy",
    },
    "Zorp.Session": {"Zorp.Cache": "ShiftCache", "Zorp.Zone": "Zone root_zone", "Zorp.Zorp": "."},
    "Zorp.Smtp": {
        "Zorp.Exceptions": "MatcherException",
        "Zorp.Matcher": "AbstractMatcher SmtpInvalidRecipientMatcher getMatcher", "Zorp.Proxy": "Proxy proxyLog",
    },
    "Zorp.Zone": {
        "Zorp.Base": "BaseZone", "Zorp.Cache": "ShiftCache", "Zorp.Domain": "Inet6Domain InetDomain",
        "Zorp.Exceptions": "ZoneException", "Zorp.Subnet": "Inet6Subnet InetSubnet Subnet",
    },
}

# Names of the Python library.  Zorp.Zorp has its own socket, sys, errno, enum and traceback.
_LIBRARY = {
    "Zorp.Cache": {"threading": ".", "time": "."},
    "Zorp.Chainer": {"types": "."},
    "Zorp.Common": {"os": ".", "re": ".", "socket": "."},
    "Zorp.Config": {"new": ".", "sys": "."},
    "Zorp.Core": {"new": "."},
    "Zorp.Dispatch": {"collections": ".", "traceback": "print_exc", "types": "."},
    "Zorp.Domain": {"socket": "htonl ntohl", "string": "atoi split"},
    "Zorp.FileLock": {"fcntl": "."},
    "Zorp.Globals": {"threading": "."},
    "Zorp.Instance": {"argparse": ".", "shlex": "."},
    "Zorp.InstancesConf": {"argparse": ".", "sys": "."},
    "Zorp.KZorp": {"functools": ".", "random": ".", "time": "."},
    "Zorp.Matcher": {"collections": ".", "os": ".", "re": ".", "smtplib": ".", "string": ".", "time": ".",
                     "types": "."},
    "Zorp.NAT": {"random": "SystemRandom choice randint", "socket": "inet_ntoa", "types": "."},
    "Zorp.Proxy": {"fcntl": ".", "hashlib": ".", "inspect": ".", "os": ".", "re": ".", "string": ".", "struct": ".",
                   "types": "."},
    "Zorp.Resolver": {"socket": "gethostbyname", "types": "."},
    "Zorp.ResolverCache": {"dns": ".", "operator": ".", "os": ".", "re": ".", "time": "."},
    "Zorp.Service": {"thread": ".", "time": ".", "types": "."},
    "Zorp.Session": {"inspect": ".", "time": "."},
    "Zorp.Smtp": {"socket": "getfqdn gethostbyaddr", "string": "find lower replace split", "time": "strftime",
                  "types": "."},
    "Zorp.SockAddr": {"string": "atoi split"},
    "Zorp.Subnet": {"socket": "htonl inet_aton inet_ntoa inet_ntop inet_pton ntohl ntohs", "string": "atoi split",
                    "struct": "."},
    "Zorp.Util": {"collections": "."},
    "Zorp.Zone": {"socket": "htonl ntohl", "struct": ".", "traceback": "print_exc", "types": "."},
    "Zorp.Zorp": {"socket": ". AF_INET AF_UNIX SOCK_DGRAM SOCK_STREAM", "sys": ".", "traceback": "."},
}


def _old_string():
    """The `string` module with the functions that Python 2 had; the texts are str."""
    module = types.ModuleType("string", "Python 2's functions on texts beside today's constants.")
    module.__dict__.update(vars(importlib.import_module("string")))
    for name in ("count", "find", "index", "lower", "lstrip", "replace", "rfind", "rstrip", "split", "strip", "upper"):
        setattr(module, name, getattr(str, name))
    module.join = lambda words, separator=" ": separator.join(words)
    module.atoi = lambda text, base=10: int(text, base)
    return module


def _old_types():
    """The `types` module with the names that Python 2 had for built-in types."""
    module = types.ModuleType("types", "Python 2's names of built-in types beside today's.")
    module.__dict__.update(
        vars(types), StringType=str, StringTypes=(str,), UnicodeType=str, IntType=int, LongType=int, FloatType=float,
        BooleanType=bool, NoneType=type(None), TupleType=tuple, ListType=list, DictType=dict, DictionaryType=dict,
        ClassType=type, InstanceType=object)
    return module


def _old_new():
    """The `new` module: makers of classes, functions and methods under their Python 2 names."""
    module = types.ModuleType("new", "Python 2's makers of built-in objects.")
    module.classobj, module.code, module.function, module.module = (
        type, types.CodeType, types.FunctionType, types.ModuleType)
    module.instancemethod = lambda function, instance, cls=None: types.MethodType(function, instance)
    return module


_OLD_LIBRARY = {"string": _old_string(), "types": _old_types(), "new": _old_new()}
_OLD_NAMES = {"thread": "_thread"}


def complete_loaded():
    """Give every loaded policy module the names it used to deliver; the end of Zorp.Core calls it."""
    complete("Zorp.Zorp")                        # others take everything it has
    for name in sorted(_STARS.keys() | _SINGLE.keys() | _LIBRARY.keys()):
        complete(name)


def complete(module_name):
    """Give one module the names it used to deliver; no effect while the module is not loaded."""
    module = sys.modules.get(module_name)
    if module is None:
        return
    for origin, names in _SINGLE.get(module_name, {}).items():
        if (source := sys.modules.get(origin)) is not None:
            _add(module, source, names.split())
    for library, names in _LIBRARY.get(module_name, {}).items():
        source = _OLD_LIBRARY.get(library) or importlib.import_module(_OLD_NAMES.get(library, library))
        _add(module, source, names.split(), own_name=library)
    for origin in _STARS.get(module_name, ()):
        if (source := sys.modules.get(origin)) is not None:
            _add(module, source, [name for name in vars(source) if not name.startswith("_") and name != "annotations"])


def _add(module, source, names, own_name=None):
    """Set each of the names that the module does not have, and let a star import deliver it."""
    delivered = getattr(module, "__all__", None)
    for name in names:
        value = source if name == "." else getattr(source, name, None)
        if name == ".":
            name = own_name or source.__name__.rpartition(".")[2]
        if value is None and not hasattr(source, name):
            continue
        if name not in vars(module):
            setattr(module, name, value)
        if delivered is not None and name not in delivered:
            module.__all__ = delivered = [*delivered, name]
