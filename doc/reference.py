"""`python -m doc.reference`: write doc/reference.md, every class that a policy may use.

Names, arguments and defaults come from the classes, the meaning from their docstrings; nothing
is written here but which chapter a class belongs to.  A class of the policy language that has no
chapter is an error, and a test holds the file in the repository to what would be written now.
Which names a star import has depends on what was imported before, so a process of its own writes.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path

from Zorp.Dispatch import BaseDispatch

PAGE = Path(__file__).parent / "reference.md"

# chapter -> modules whose classes it has, in this order
CHAPTERS = {
    "Zones": ("Zorp.Zone", "Zorp.Subnet"),
    "Rules": ("Zorp.Rule", "Zorp.rules.conditions"),
    "Services": ("Zorp.Service",),
    "Dispatchers": ("Zorp.Dispatch", "Zorp.acceptance.binds", "Zorp.Listener", "Zorp.Receiver"),
    "Addresses": ("Zorp.SockAddr",),
    "Routers": ("Zorp.Router",),
    "Chainers": ("Zorp.Chainer",),
    "NAT": ("Zorp.NAT",),
    "Matchers and resolvers": ("Zorp.Matcher", "Zorp.Resolver"),
    "Stacking": ("Zorp.Stack",),
    "Proxies": ("Zorp.Proxy", "Zorp.AnyPy", "Zorp.Plug", "Zorp.Smtp"),
    "Sessions and connections": ("Zorp.Session", "Zorp.Stream", "Zorp.Attach", "Zorp.ProxyGroup", "Zorp.FileLock"),
    "Exceptions": ("Zorp.Exceptions",),
}
# machinery that proxies of ours import, and what is refused with a message of its own
_NO_LANGUAGE = ("Zorp.engine.", "Zorp.transport.", "Zorp.stacking.", "Zorp.language.unbuilt", "Zorp.acceptance.verdict",
                "Zorp.acceptance.dispatch_table", "Zorp.Constants", "Zorp.Base")
# their keyword arguments are those of the classes behind which they stand
_BASES = {BaseDispatch: "Dispatchers"}
_IMPORTS = "from Zorp.Core import *\nfrom Zorp.Plug import *\nfrom Zorp.Smtp import *\nfrom Zorp.AnyPy import *\n"

INTRODUCTION = """\
# Reference of the policy language

Written by `python -m doc.reference` from the classes themselves; do not edit.

Every class of `from Zorp.Core import *` and of the proxies, with its arguments and their defaults. What a proxy's
`config()` may set is in [attributes.md](attributes.md); examples that work are in [guide.md](guide.md). `*` stands for:
from here on by name only; `**kw` for the further arguments that the text names. `TRUE` is 1, `FALSE` is 0.
"""


def classes() -> dict[str, list[tuple[type, list[str]]]]:
    """Return chapter -> classes with all names that policies know them by; ValueError names those without a chapter."""
    names: dict[str, object] = {}
    exec(_IMPORTS, names)                # what a policy sees, no more and no less
    known: dict[type, list[str]] = {}
    for name, value in sorted(names.items()):
        if inspect.isclass(value) and value.__module__.startswith("Zorp.") and not name.startswith("_"):
            known.setdefault(value, []).append(name)
    found: dict[str, list[tuple[type, list[str]]]] = {chapter: [] for chapter in CHAPTERS}
    lost = []
    for cls, chapter in _BASES.items():
        found[chapter].append((cls, [cls.__name__]))
    for cls, aliases in known.items():
        chapter = next((chapter for chapter, modules in CHAPTERS.items() if _belongs(cls, modules)), None)
        if chapter is not None:
            found[chapter].append((cls, aliases))
        elif not cls.__module__.startswith(_NO_LANGUAGE):
            lost.append(f"{cls.__module__}.{cls.__name__} has no chapter")
    if lost:
        raise ValueError("\n".join(lost))
    for chapter, modules in CHAPTERS.items():
        found[chapter].sort(key=lambda item: (_position(item[0], modules), item[0].__name__))
    return found


def _belongs(cls: type, modules: tuple[str, ...]) -> bool:
    return any(cls.__module__ == module or cls.__module__.startswith(module + ".") for module in modules)


def _position(cls: type, modules: tuple[str, ...]) -> int:
    return next(number for number, module in enumerate(modules) if _belongs(cls, (module,)))


def page() -> str:
    """Return the text of the page; ValueError names classes without a chapter."""
    parts = [INTRODUCTION]
    for chapter, members in classes().items():
        parts.append(f"\n## {chapter}\n")
        parts += [_entry(cls, aliases) for cls, aliases in members]
    return "".join(parts)


def _entry(cls: type, aliases: list[str]) -> str:
    own = cls.__name__ if cls.__name__ in aliases else aliases[0]
    others = [f"`{name}`" for name in aliases if name != own]
    also = f"Also known as {', '.join(others)}.\n\n" if others else ""
    members = ", ".join(f"`{name}`" for name in getattr(cls, "__members__", ()))
    members = f"\nMembers: {members}.\n" if members else ""
    return f"\n### {own}\n\n{_call(cls, own)}{also}{_text(inspect.getdoc(cls) or '')}{members}"


def _call(cls: type, name: str) -> str:
    """Return how it is made, as code; nothing for what a policy does not make itself."""
    if issubclass(cls, Exception) or hasattr(cls, "__members__"):
        return ""
    try:
        parameters = list(inspect.signature(cls).parameters.values())
    except (TypeError, ValueError):
        return ""
    if [parameter.name for parameter in parameters] == ["session"]:
        return ""                        # proxies: sessions make them
    arguments = ", ".join(_argument(parameter, parameters) for parameter in parameters)
    lines = textwrap.wrap(f"{name}({arguments})", 110, subsequent_indent=" " * (len(name) + 1),
                          break_long_words=False, break_on_hyphens=False)
    return "```python\n" + "\n".join(lines) + "\n```\n\n"


def _argument(parameter: inspect.Parameter, parameters: list[inspect.Parameter]) -> str:
    shown = parameter.replace(annotation=inspect.Parameter.empty)
    if shown.default is not inspect.Parameter.empty and hasattr(shown.default, "name"):
        text = f"{shown.name}={type(shown.default).__name__}.{shown.default.name}"
    else:
        text = str(shown)
    first_by_name = next((one for one in parameters if one.kind is one.KEYWORD_ONLY), None)
    return f"*, {text}" if parameter is first_by_name else text


def _text(doc: str) -> str:
    """Return a docstring as Markdown: examples as code, the list of arguments as a list."""
    lines: list[str] = []
    in_arguments = False
    for line in doc.splitlines():
        if re.match(r"Arguments.*:$", line):
            in_arguments = True
            lines += [line, ""]
        elif in_arguments and (found := re.match(r"    ([\w*][^:]*): (.*)", line)):
            names = re.sub(r"[*\w]+", lambda word: f"`{word[0]}`", found[1]) if "(" not in found[1] else f"`{found[1]}`"
            lines.append(f"- {names}: {found[2]}")
        elif in_arguments and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            in_arguments = in_arguments and (not line or line.startswith(" "))
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        PAGE.write_text(page(), encoding="utf-8")
    except ValueError as problem:
        sys.exit(str(problem))
