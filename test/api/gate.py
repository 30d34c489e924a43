"""The completeness gate: which checks there are, which may fail, and how many hold.

UNBUILT is the one list of modules that the old releases had and this one has not yet.
"""

from __future__ import annotations

from test.api import objects, proxies, walk
from test.support import api

UNBUILT = frozenset({
    "APR", "Auth", "AuthDB", "Detector", "Encryption", "Finger", "Ftp", "Http", "Keybridge", "LegacyEncryption",
    "Pop3", "Pssl", "Telnet", "Whois",
})

BUILT = tuple(module for module in api.modules() if module not in UNBUILT)


def checks(module):
    """Return every check of one module, in the order of the data."""
    return [*walk.checks(module), *objects.checks(module), *proxies.checks(module)]


def failures(module, kind=None):
    """Return {check text: problem} of the checks of a module that do not hold now."""
    found = {}
    for check in checks(module):
        if kind is None or check.kind == kind:
            problem = check.problem()
            if problem is not None:
                found[str(check)] = problem
    return found
