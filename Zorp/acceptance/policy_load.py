"""What stands around the init() of a policy, the stock one or the policy's own.

Inside loading() dispatchers may be created, for only then is the runtime ready to listen for
them.  At its end the steps that need the whole policy are taken, and what only the finished
policy can tell is checked: names that were used before they were defined.
"""

from __future__ import annotations

import contextlib

from Zorp import Globals
from Zorp.Config import take_unknown_options
from Zorp.Constants import CORE_POLICY
from Zorp.Log import log


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


def _check_references():
    """Look at what only the finished policy can tell: names that were used before they were defined."""
    for matcher in Globals.matchers.values():
        matcher.validateMatcher()
    if Globals.rules is not None:
        Globals.rules.check()
    for option in take_unknown_options():
        log(None, CORE_POLICY, 2,
            "No such option, the value is kept for the policy only; option='config.%s', place='%s'", option)
