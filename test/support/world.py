"""A policy's world for one test: empty registries, a zone for everything, and back as it was afterwards.

    with policy_world() as names:
        names["Service"]("web", names["PlugProxy"])

`names` is what `from Zorp.Core import *` and a few proxy modules give a policy.  Inside, the
policy counts as being loaded, so dispatchers may be made.  Not for several threads at once.
"""

from __future__ import annotations

import contextlib
import copy
import importlib


@contextlib.contextmanager
def policy_world(*, zones=True):
    """Yield the names of a policy in empty registries; with a zone `internet` unless told otherwise."""
    core = importlib.import_module("Zorp.Core")
    registries = importlib.import_module("Zorp.Globals")
    saved = {name: (value, copy.copy(value) if isinstance(value, (dict, list)) else None)
             for name, value in vars(registries).items() if not name.startswith("__")}
    _empty(registries, saved)
    registries.parsing = True
    names = {name: value for name, value in vars(core).items() if not name.startswith("_")}
    names["PlugProxy"] = importlib.import_module("Zorp.Plug").PlugProxy
    try:
        with _own_zone_table():
            if zones:
                names["Zone"]("internet", ["0.0.0.0/0", "::/0"])
            yield names
    finally:
        _restore(registries, saved)


def _empty(registries, saved):
    for name, (value, _) in saved.items():
        if name.endswith("_callbacks"):
            continue                     # registered by modules, not by policies
        if isinstance(value, (dict, list)):
            value.clear()
        elif name == "dispatch_table" and value is not None:
            registries.dispatch_table = type(value)()
        elif name == "rules" and value is not None:
            registries.rules = type(value)()


def _restore(registries, saved):
    for name, (value, content) in saved.items():
        if isinstance(value, dict):
            value.clear()
            value.update(content)
        elif isinstance(value, list):
            value[:] = content
        setattr(registries, name, value)


@contextlib.contextmanager
def _own_zone_table():
    """Zones register in a look-up table beside the registries: one for this world."""
    module = importlib.import_module("Zorp.Zone")
    saved = module._table, module.Zone.has_dynamic_subnet
    module._table = module.Zone.zone_subnet_tree = type(module._table)()
    module.Zone.has_dynamic_subnet = False
    try:
        yield
    finally:
        module._table, module.Zone.has_dynamic_subnet = saved
        module.Zone.zone_subnet_tree = saved[0]
