"""Zorp: an application-level proxy firewall driven by a Python policy.

UNBUILT names the modules that policies may know from earlier releases and that this release
does not have.  Importing one fails with a message that says so, instead of "No module named",
so that the administrator does not look for a broken installation.
"""

from __future__ import annotations

import importlib.abc
import sys

__version__ = "8.0.0"

UNBUILT = frozenset({
    "APR", "Auth", "AuthDB", "Detector", "Encryption", "Finger", "Ftp", "Http", "Keybridge",
    "LegacyEncryption", "Pop3", "Pssl", "Telnet", "Whois",
})


class _UnbuiltModules(importlib.abc.MetaPathFinder):
    """Answers imports of modules that do not exist here; finds nothing else."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, module = fullname.partition(".")
        if package == __name__ and module in UNBUILT:
            raise ModuleNotFoundError(
                f"{fullname} is not built yet; this release has no {module} module",
                name=fullname)


sys.meta_path.insert(0, _UnbuiltModules())
