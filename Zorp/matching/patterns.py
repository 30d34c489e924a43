"""Regular expressions that a policy gives us, for text with one character per byte.

Theory of operation
    compile_pattern() makes an object with search().  Classes such as \\w and the folding of
    case know ASCII only, so that a byte above 0x7F is never a letter.  What policies of
    Python 2 could write and `re` no longer takes is put right: flags in the middle of a pattern
    go to its front, a backslash before a letter without meaning is dropped.

    byte_pattern() turns the non-ASCII characters of a Python 3 literal into their UTF-8 bytes,
    each character one group, so that "ü+" repeats the whole character.

Time
    `re` holds the interpreter while it backtracks, so one pattern and one hostile text could
    stop a whole worker.  repetition() finds by the form of a pattern whether that is possible.
    Where the package `regex` is installed, such patterns run in it, without the interpreter
    lock and for SEARCH_SECONDS at most; PatternTimeout then refuses.  Where it is not, the
    caller's bound on the length of the text is all there is.

Sets
    `[[:digit:]]`, `[a-z--aeiou]` and the like mean more in other dialects, and perhaps in a later
    `re`, than the single characters that they are here; a deny list that holds one never fires.
    set_of_another_dialect() finds them, so that their author hears of them when the policy loads,
    and Python's own warning, which nobody would read, is switched off for this module.
"""

from __future__ import annotations

import enum
import re
import warnings

try:
    import regex
except ImportError:              # an optional extra
    regex = None

SEARCH_SECONDS = 1.0

warnings.filterwarnings("ignore", "Possible (nested )?set", FutureWarning, __name__.replace(".", r"\."))

_IN_A_ROW = 4                    # open repetitions in one pattern from which their power freezes a worker
_MANY = 10                       # a bounded repetition that may run this often counts as unbounded
_TOKEN = re.compile(r"""
      \\.
    | (?P<set> \[ \^? \]? (?: \\. | [^\]\\] )* \] )
    | \(\?\# [^)]* \)                                               # a comment
    | \(\?P= \w+ \)
    | (?P<flags> \(\? [aiLmsux]+ \) )
    | (?P<open> \( (?: \? (?: P<\w+> | <[=!] | [:=!>] | [aiLmsux]*-?[imsx]*: | \( \w+ \) ) )? )
    | (?P<close> \) )
    | (?P<or> \| )
    | (?P<repeat> [*+?] | \{ (?P<least> [0-9]* ) (?P<comma> ,? ) (?P<most> [0-9]* ) \} ) [?+]?
    | .
""", re.VERBOSE | re.DOTALL)
_ANOTHER_DIALECT = re.compile(r"\[[:.=] | ^\[. | (?<=.)(?:--|&&|~~|\|\|)", re.VERBOSE)     # of what a set holds
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_MEANINGLESS_ESCAPE = re.compile(r"(\\[^A-Za-z]|\\[AbBdDsSwWZafnrtvxuUN])|\\(.)", re.DOTALL)
_DIALECT_FLAGS = re.compile("[aLu]")
_COMPILE_ERRORS = (re.error, ValueError, OverflowError, RecursionError)


class PatternTimeout(TimeoutError):
    """A search took longer than SEARCH_SECONDS."""


class Repetition(enum.IntEnum):
    """How the time of a search may grow with the length of the text."""

    FEW = 0         # at most one open repetition: at worst quadratic, over all starting points
    MANY = 1        # a higher power, or alternatives that are repeated and begin differently
    NESTED = 2      # repetition of a repetition, of alternatives that may begin alike, or of what may be
                    # empty, or so many in a row that the power is no comfort: possibly exponential


class _TimeLimited:
    """A pattern of the package `regex` whose search() is bounded."""

    __slots__ = ("_compiled", "pattern")

    def __init__(self, compiled, pattern):
        self._compiled = compiled
        self.pattern = pattern

    def search(self, string):
        """Return a match object or None; raises PatternTimeout."""
        try:
            return self._compiled.search(string, timeout=SEARCH_SECONDS, concurrent=True)
        except TimeoutError:
            raise PatternTimeout(self.pattern) from None


def compile_pattern(pattern: str, *, ignore_case: bool):
    """Return a compiled pattern with search(); raises re.error with the reason."""
    flags = re.ASCII | (re.IGNORECASE if ignore_case else 0)
    try:
        compiled = re.compile(pattern, flags)
    except _COMPILE_ERRORS as problem:
        pattern = _in_todays_words(pattern)
        try:
            compiled = re.compile(pattern, flags)
        except _COMPILE_ERRORS:
            raise re.error(str(problem)) from None
    if regex is None or repetition(pattern) is Repetition.FEW:
        return compiled
    try:
        return _TimeLimited(regex.compile(pattern, regex.V0 | regex.ASCII | (regex.IGNORECASE if ignore_case else 0)),
                            pattern)
    except (regex.error, *_COMPILE_ERRORS):
        return compiled


def byte_pattern(pattern: str) -> str:
    """Return the pattern with its non-ASCII characters as the characters of their UTF-8 bytes; raises re.error."""
    if pattern.isascii():
        return pattern
    return "".join(_as_bytes(token[0]) for token in _TOKEN.finditer(pattern))


def _as_bytes(token: str) -> str:
    if token.isascii():
        return token
    if token[0] == "[":
        raise re.error("a set holds single bytes; write (?:ä|ö) instead of [äö]")
    return "(?:" + token.removeprefix("\\").encode("utf-8").decode("latin-1") + ")"


def _in_todays_words(pattern: str) -> str:
    flags, rest = set(), []
    for token in _TOKEN.finditer(pattern):
        if token["flags"]:
            flags.update(_DIALECT_FLAGS.sub("", token["flags"][2:-1]))
        else:
            rest.append(_MEANINGLESS_ESCAPE.sub(lambda found: found[1] or found[2], token[0]))
    return (f"(?{''.join(sorted(flags))})" if flags else "") + "".join(rest)


class _Group:
    """What one pair of brackets holds so far."""

    __slots__ = ("_starts", "has_optional", "has_repetition")

    def __init__(self):
        self._starts = [None]            # the first token of every alternative; None: nothing yet
        self.has_optional = self.has_repetition = False

    @property
    def has_alternatives(self) -> bool:
        return len(self._starts) > 1

    def begins_with(self, token: str) -> None:
        if self._starts[-1] is None:
            self._starts[-1] = token

    def alternative(self) -> None:
        self._starts.append(None)

    def may_begin_alike(self) -> bool:
        """True unless every alternative begins with another plain character."""
        plain = {start for start in self._starts if start is not None and len(start) == 1 and start not in ".^$"}
        return self.has_alternatives and len(plain) < len(self._starts)


def repetition(pattern: str) -> Repetition:
    """Judge a pattern by its form; it is too careful rather than not careful enough."""
    open_groups = [_Group()]
    last = _Group()                      # what a repetition that comes next would repeat
    worst, count = Repetition.FEW, 0
    for token in _TOKEN.finditer(pattern):
        if token["open"]:
            open_groups[-1].begins_with(token[0])
            open_groups.append(_Group())
        elif token["close"] and len(open_groups) > 1:
            last = open_groups.pop()
            open_groups[-1].has_repetition |= last.has_repetition
        elif token["or"]:
            open_groups[-1].alternative()
        elif token["repeat"]:
            if not _is_open(token):
                open_groups[-1].has_optional |= token["repeat"] == "?"
                continue
            count += 1
            if last.has_repetition or last.has_optional or last.may_begin_alike() or count >= _IN_A_ROW:
                return Repetition.NESTED
            if last.has_alternatives:
                worst = Repetition.MANY
            open_groups[-1].has_repetition = True
        else:
            open_groups[-1].begins_with(token[0])
            last = _Group()
    return Repetition.MANY if count > 1 else worst


def set_of_another_dialect(pattern: str) -> str | None:
    """Return the first set of a pattern that would mean something else in another dialect; None: there is none."""
    sets = (token["set"] for token in _TOKEN.finditer(pattern) if token["set"])
    return next((text for text in sets
                 if _ANOTHER_DIALECT.search(_ESCAPE.sub("_", text[1:-1].removeprefix("^")))), None)


def _is_open(token) -> bool:
    """Tell whether a repetition may run many times."""
    if token["repeat"] in "*+?":
        return token["repeat"] != "?"
    if not token["comma"]:
        return int(token["least"] or 0) >= _MANY
    return not token["most"] or int(token["most"]) >= _MANY
