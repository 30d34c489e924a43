"""Questions about the statistics tree and the log settings of one worker (szig 3 to 6).

Theory of operation
    The master takes a request from a control connection and hands the line to the worker that
    it is for; the worker's loop answers here, so an answer also proves that the loop turns.
    The counters are those of Zorp.Szig; below `info` lie facts of the process, set with
    set_info(), which the counters know nothing of.

    A node's name is its path with "." between the components; bytes up to 0x20, ".", "%" and
    bytes over 0x7F are written as %XX.  A leading component `zorp`, the habit of old clients,
    means the root, and answers repeat it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import traceback

from Zorp import Log
from Zorp.engine.builtin_proxy import running
from Zorp.Log import log
from Zorp.runtime.logsetup import change_spec, change_verbosity
from Zorp.Szig import statistics

_MUST_ESCAPE = re.compile(rb"[\x00-\x20.%\x80-\xff]")
_ESCAPED = re.compile(r"%([0-9A-Fa-f]{2})|%.{0,2}", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SESSION = re.compile(r"(?P<service>svc/(?:(?P<vname>[^/]+)/)?[^/]+:[0-9]+)(?P<rest>/.*)?$")
_OLD_ROOT = "zorp"

Path = tuple[str, ...]


def escape(component: str) -> str:
    """Write one component of a name."""
    raw = component.encode("utf-8", "surrogateescape")
    return _MUST_ESCAPE.sub(lambda found: b"%%%02X" % found[0][0], raw).decode("ascii")


def unescape(component: str) -> str:
    """Read one component; a % without two hex digits takes the next two characters with it."""
    raw = _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", component)
    return raw.encode("latin-1", "replace").decode("utf-8", "surrogateescape")


def parse_name(name: str) -> Path:
    """Return the raw components below the root."""
    parts = name.split(".") if name else []
    if parts[:1] == [_OLD_ROOT]:
        del parts[0]
    return tuple(map(unescape, parts))


class Answers:
    """Answers requests; for the thread of the worker's loop."""

    def __init__(self) -> None:
        self._info: dict[str, object] = {}

    def set_info(self, **leaves: object) -> None:
        """Set leaves below `info`; a name with "__" in it is a path: policy__file."""
        for name, value in leaves.items():
            *branches, leaf = name.split("__")
            node = self._info
            for branch in branches:
                node = node.setdefault(branch, {})
            node[leaf] = value

    def answer(self, line: str) -> str:
        """Return the answer to one request, without the final newline."""
        words = line.split(" ")
        handler = getattr(self, f"_do_{words[0]}", None) if words[0].isalpha() else None
        return handler(words[1:]) if handler is not None else "FAIL No such command"

    # ---- the tree

    def _do_GETVALUE(self, words: list[str]) -> str:
        return self._value(parse_name(_first(words)))

    def _do_GETCHILD(self, words: list[str]) -> str:
        name = _first(words)
        child = next(iter(self._children(parse_name(name))), None)
        if child is None:
            return "None"
        return f"{name}.{escape(child)}" if name else escape(child)

    def _do_GETSBLNG(self, words: list[str]) -> str:
        name = _first(words)
        path = parse_name(name)
        if not path:
            return "None"
        sibling = self._next_sibling(path)
        if sibling is None:
            return "None"
        parent, dot, _own = name.rpartition(".")
        return f"{parent}{dot}{escape(sibling)}"

    def _do_DUMP(self, words: list[str]) -> str:
        name = _first(words)
        path = parse_name(name)
        lines: list[str] = []
        _walk(_below(self._tree(), path), name, lines)
        return "\n".join([*lines, "."])

    def _do_JSON(self, words: list[str]) -> str:
        return json.dumps(_below(self._tree(), parse_name(_first(words))), sort_keys=True)

    def _value(self, path: Path) -> str:
        if path[:1] == ("info",):
            found = _below(self._info, path[1:])
            return "None" if found is None or isinstance(found, dict) else _shown(found)
        value = statistics.value(path)
        return "None" if value is None else _shown(value)

    def _children(self, path: Path) -> list[str]:
        if path[:1] == ("info",):
            found = _below(self._info, path[1:])
            return sorted(found) if isinstance(found, dict) else []
        return statistics.children(path)

    def _next_sibling(self, path: Path) -> str | None:
        if path[0] == "info" and len(path) > 1:
            return next((name for name in self._children(path[:-1]) if name > path[-1]), None)
        return statistics.next_sibling(path)

    def _tree(self) -> dict:
        return {**statistics.tree(), "info": self._info}

    # ---- the log

    def _do_LOGGING(self, words: list[str]) -> str:
        if not words:
            return "FAIL LOGGING subcommand required"
        present = Log.current_filter()
        argument = words[1] if len(words) > 1 else ""
        match words[0]:
            case "VINC":
                return f"OK {change_verbosity(present.verbosity + _number(argument))}"
            case "VDEC":
                return f"OK {change_verbosity(present.verbosity - _number(argument))}"
            case "VSET":
                return f"OK {change_verbosity(_number(argument))}"
            case "VGET":
                return f"OK {present.verbosity}"
            case "GETSPEC":
                return f"OK {present.spec}"
            case "SETSPEC" if not argument:
                return "FAIL No logspec specified"
            case "SETSPEC":
                return f"OK {argument}" if change_spec(argument) else "FAIL Error setting logspec"
        return "FAIL"

    # ---- sessions and threads

    def _do_STOPSESSION(self, words: list[str]) -> str:
        """The number of proxies that were told to stop; the master adds up what its workers say."""
        session_id = _session_id(_first(words))
        return str(running.stop_session(session_id) if session_id else 0)

    def _do_STACKDUMP(self, words: list[str]) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            for entry in traceback.format_stack(frame):
                for line in entry.rstrip("\n").split("\n"):
                    log(names.get(ident, str(ident)), "core.error", 0, "Stack: %s", (line,))
        return "OK Stack of every thread is in the log"


def _first(words: list[str]) -> str:
    return words[0] if words else ""


def _session_id(text: str) -> str | None:
    """The id of a service session or a proxy, without the doubled virtual name that conns shows; None: neither.

    A shorter text, which would mean a service or a whole process, is not taken.
    """
    found = _SESSION.match(text)
    if found is None:
        return None
    if found["rest"] == f"/{found['vname']}":
        return found["service"]
    return text


def _number(text: str) -> int:
    """A number as C reads it: what is not one is 0."""
    found = re.match(r"[+-]?[0-9]{1,9}", text)
    return int(found[0]) if found else 0


def _shown(value: object) -> str:
    return _CONTROL.sub(lambda found: f"<{ord(found[0]):02X}>", str(value))


def _below(node: object, path: Path) -> object:
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _walk(node: object, name: str, lines: list[str]) -> None:
    if name:
        lines.append(f"{name}: {'None' if node is None or isinstance(node, dict) else _shown(node)}")
    if isinstance(node, dict):
        for child in sorted(node, key=lambda raw: raw.encode("utf-8", "surrogateescape")):
            _walk(node[child], f"{name}.{escape(child)}" if name else escape(child), lines)
