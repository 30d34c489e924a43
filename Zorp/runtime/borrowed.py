"""Names that a policy forgot to import: taken from Zorp.Core, with a warning.

Examples in the papers import a proxy module only (`from Zorp.Smtp import *`) and go on with
Service and Rule.  Such a file runs: a name that neither it nor Python knows is looked up in
Zorp.Core before it becomes a NameError, and each is reported once.  Files that import
Zorp.Core themselves get Python's own built-ins, unchanged.
"""

from __future__ import annotations

import builtins
import types

from Zorp import Core
from Zorp.Log import log


class BorrowedNames(dict):
    """The built-ins of a policy that does not import Zorp.Core."""

    def __init__(self, path: str) -> None:
        super().__init__(vars(builtins))
        self._path = path

    def __missing__(self, name: str):
        try:
            value = getattr(Core, name)
        except AttributeError:
            raise KeyError(name) from None
        log(None, "core.policy", 2, "Name is not imported by the policy, taken from Zorp.Core; name='%s', file='%s'",
            (name, self._path))
        self[name] = value
        return value


def builtins_for(code: types.CodeType, path: str) -> dict:
    """Return what `__builtins__` of a compiled policy file shall be."""
    return vars(builtins) if _imports_core(code) else BorrowedNames(path)


def _imports_core(code: types.CodeType) -> bool:
    """Whether the file, or a function in it, imports Zorp.Core; no other name has a dot in it."""
    return "Zorp.Core" in code.co_names or any(
        _imports_core(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
