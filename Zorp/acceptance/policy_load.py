"""What stands around the init() of a policy, the stock one or the policy's own.

Inside loading() dispatchers may be created, for only then is the runtime ready to listen for
them.  At its end the steps that need the whole policy are taken, and what only the finished
policy can tell is checked: names that were used before they were defined.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable

from Zorp import Globals
from Zorp.Config import take_unknown_options
from Zorp.Constants import CORE_ERROR, CORE_POLICY
from Zorp.Exceptions import PolicyError
from Zorp.Log import log

_HOOKS = frozenset({"init", "deinit", "cleanup", "purge"})       # functions of a policy that are no instances


@contextlib.contextmanager
def loading(names, virtual_name=""):
    """Enter the load of a policy; its last steps are not taken when init() raised.

    Raises PolicyError at the end when the finished policy contradicts itself.
    """
    Globals.virtual_instance_name = virtual_name
    Globals.instance_name = names[0]
    Globals.parsing = True
    try:
        yield
        for finish in Globals.parsed_callbacks:
            finish()
    finally:
        Globals.parsing = False
    _check_references()


def instance_functions(policy: types.ModuleType, names) -> list[Callable]:
    """Return what the policy calls by the names of its instances.  PolicyError names one that is missing."""
    missing = next((name for name in names if not hasattr(policy, name)), None)
    if missing is None:
        return [getattr(policy, name) for name in names]
    log(None, CORE_ERROR, 0, "Instance definition not found in policy; instance='%s'", (missing,))
    lines = {name: value.__code__.co_firstlineno for name, value in vars(policy).items()
             if isinstance(value, types.FunctionType) and value.__module__ == policy.__name__ and name not in _HOOKS}
    found = ", ".join(f"{name} (line {line})" for name, line in sorted(lines.items(), key=lambda item: item[1]))
    raise PolicyError(f"No function for instance '{missing}'", place=policy.__file__,
                      remedy=f"define it, or name one of these with --as: {found}" if found else
                      f"the policy has no function; define one, 'def {missing}():'")


def _check_references():
    """Look at what only the finished policy can tell: names that were used before they were defined."""
    for matcher in Globals.matchers.values():
        matcher.validateMatcher()
    if Globals.rules is not None:
        Globals.rules.check()
    Globals.dispatch_table.warn_of_idle_entries()
    for option in take_unknown_options():
        log(None, CORE_POLICY, 2,
            "No such option, the value is kept for the policy only; option='config.%s', place='%s'", option)
