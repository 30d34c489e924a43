"""Names that a policy forgot to import: taken from Zorp.Core, with a warning.

Examples in the papers import a proxy module only (`from Zorp.Smtp import *`) and go on with
Service and Rule.  Such a file runs: a name that neither it nor Python knows is looked up in
Zorp.Core before it becomes a NameError, and each is reported once.  Files that import
Zorp.Core themselves get Python's own built-ins, unchanged.
"""

from __future__ import annotations

import ast
import builtins

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


def builtins_for(source: str, path: str) -> dict:
    """Return what `__builtins__` of a policy file shall be."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return vars(builtins)                       # compiling it will say what is wrong
    for node in ast.walk(tree):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [
            alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if "Zorp.Core" in modules:
            return vars(builtins)
    return BorrowedNames(path)
