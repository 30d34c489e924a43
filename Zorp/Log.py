"""log(): filter by tag and level, format once, escape once, hand over to the sink.

    core.session(3): (svc/intra/office_http:17): Starting proxy instance; client_fd='23', ...
    tag      level   session id                  fixed text; then key='value' pairs

Theory of operation
    A message is written when its level is at most the effective verbosity of its tag: the
    number of the first item of the log spec that matches the tag, else the global verbosity.
    The answer is kept per tag, so the usual refusal is one dictionary look-up, and arguments are
    neither formatted nor even looked at before it.

    What passes goes to `sink(tag, level, session, text)`.  The runtime installs one that writes
    to the system log or to stderr (Zorp.process.logsinks); without it lines go to sys.stderr.
    A change of the settings replaces one immutable Filter; no lock is needed.

Guarantees, because logs are evidence
    One call is one record: control characters are written as <XX> per byte, wherever they come
    from; also those of Unicode that end lines, turn the direction of writing, or are not seen.
    Nothing that a peer sends can forge a field: `'` in an argument is written as <27> when the
    text quotes its arguments, and an argument longer than VALUE_BYTES is cut with a mark, so
    that the rest of the line survives.  Bytes of text (one character per byte) that are valid
    UTF-8 are written as such, others as <XX>.
    log() never raises; a text that does not fit its arguments is reported and written raw.

    A sink of structured records (JSON, RFC 5424) gets the values as they are: nothing escaped,
    QUOTE for a `'` that belongs to a value.  It calls escaped() where it needs the line.
"""

from __future__ import annotations

import codecs
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable

DEFAULT_VERBOSITY = 3
DEFAULT_SPEC = "*.summary:4,*.accounting:4"
VALUE_BYTES = 2048
_AUDIT_TAGS, _AUDIT_LEVEL = ("core.summary", "core.accounting"), 4
_CUT_MARK = "…(cut)"
_MAX_KNOWN_TAGS = 1000           # policies may invent tags; the look-up table must not grow for ever
_MAX_KNOWN_TEXTS = 1000          # so may the texts of messages be

QUOTE = "\udc27"                 # a quote within a value; no decoding makes this character

# for a character class: C0, DEL, C1; separators of lines and paragraphs; format characters, which nobody sees: marks
# that turn the direction of text, joiners, spaces without width, tags
HARMFUL = ("\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
           "\U000e0001-\U000e007f")
_CONTROL = re.compile(f"[{HARMFUL}]")
_OVER_7F = re.compile(r"[^\x00-\x7f]")
_ITEM = re.compile(r"[ ,]*([A-Za-z0-9.*]+):\s*(\d*)[^,]*")


class BadLogSpec(ValueError):
    """The log spec cannot be read; `str()` says why."""


class Filter:
    """Verbosity and log spec: what is written.  Replaced as a whole, never changed."""

    __slots__ = ("_items", "levels", "loudest", "spec", "verbosity")

    def __init__(self, verbosity: int, spec: str) -> None:
        """Raises BadLogSpec; the verbosity is taken as it is."""
        self.verbosity = verbosity
        self.spec = spec
        self._items = parse_spec(spec)
        self.loudest = max(verbosity, *(level for _pattern, level in self._items), 0)
        self.levels: dict[str, int] = {}

    def effective(self, tag: str) -> int:
        """The verbosity that holds for this tag."""
        parts = tag.split(".")
        found = next((level for pattern, level in self._items if _covers(pattern, parts)), self.verbosity)
        if len(self.levels) < _MAX_KNOWN_TAGS:
            self.levels[tag] = found
        return found

    def shadowed_items(self) -> list[str]:
        """The items of the spec that can never decide, because an earlier one matches all they match."""
        return [".".join(pattern) for index, (pattern, _level) in enumerate(self._items)
                if any(_covers(earlier, pattern) for earlier, _level in self._items[:index])]


def parse_spec(text: str) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Return the items of a log spec, (parts of the pattern, level), in order.  Raises BadLogSpec."""
    items = []
    position = 0
    while position < len(text) or (not items and text):
        found = _ITEM.match(text, position)
        if found is None:
            raise BadLogSpec(f"pattern:number expected at '{text[position:]}'")
        items.append((tuple(found[1].split(".")), int(found[2] or 0)))
        position = found.end()
        if text[position:position + 1] == ",":
            position += 1
            if position == len(text):
                raise BadLogSpec("an item is missing after the last comma")
    return tuple(items)


def unrecorded(spec: str) -> list[str]:
    """Return the categories of the audit trail that no item of a readable log spec keeps at their level."""
    silent = Filter(0, spec)
    return [tag for tag in _AUDIT_TAGS if silent.effective(tag) < _AUDIT_LEVEL]


def _covers(pattern, parts) -> bool:
    """A shorter pattern is a prefix; a part `*` is any one part."""
    return len(pattern) <= len(parts) and all(
        want in ("*", have) for want, have in zip(pattern, parts, strict=False))


Sink = Callable[[str, int, str | None, str], None]


def _plain_sink(tag: str, level: int, session: str | None, text: str) -> None:
    sys.stderr.write(f"{time.strftime('%b %d %H:%M:%S')} {line_of(tag, level, session, text)}\n")


def line_of(tag: str, level: int, session: str | None, text: str) -> str:
    """A record without date and program: `tag(level): (session): text`."""
    if session is None:
        return f"{tag}({level}): {text}"
    return f"{tag}({level}): ({session}): {text}"


_filter = Filter(DEFAULT_VERBOSITY, DEFAULT_SPEC)
loudest = _filter.loudest        # nothing above this level is written, whatever its tag: spares hot code a call
_sink: Sink = _plain_sink


def _nothing() -> None:
    pass


hold: Callable[[], None] = _nothing      # lines of this thread may wait, to be written at once ...
let_go: Callable[[], None] = _nothing    # ... now; for stretches that neither wait nor run policy code
_throttle: Callable[[str, str], bool] | None = None      # (tag, text) -> may this one be written
_escape_high = False
_is_structured = False
show_secrets = False             # --log-secrets; who logs attributes and headers looks here


def configure(*, sink: Sink | None = None, throttle: Callable[[str, str], bool] | None = None,
              escape_high: bool = False, secrets: bool = False, structured: bool = False) -> None:
    """Install what the command line asks for; called before there are threads."""
    global _sink, _throttle, _escape_high, _is_structured, show_secrets, hold, let_go
    _sink = _plain_sink if sink is None else sink.__call__       # the method: to call an object costs twice as much
    hold, let_go = getattr(sink, "hold", _nothing), getattr(sink, "let_go", _nothing)
    _throttle = throttle
    _escape_high = escape_high
    _is_structured = structured
    show_secrets = secrets


def current_filter() -> Filter:
    """The verbosity and spec in force."""
    return _filter


def set_filter(new: Filter) -> None:
    """Put another verbosity and spec in force, for all threads from their next message on."""
    global _filter, loudest
    _filter, loudest = new, new.loudest


def is_structured() -> bool:
    """True when records are written with facts that the classic line has no room for."""
    return _is_structured


def enabled(tag: str, level: int) -> bool:
    """True when a message of this tag and level would be written."""
    present = _filter
    known = present.levels.get(tag)
    return level <= (present.effective(tag) if known is None else known)


def log(sessionid, logclass, verbosity, msg=None, args=None) -> None:
    """Write a message; log(tag, level, text) without session id is accepted too.

    sessionid: None or "" means the name of the thread.  args: a tuple, a mapping or one value
    for `%` in msg; None: msg is written as it is.  Never raises.
    """
    try:
        if msg is None:
            sessionid, logclass, verbosity, msg = None, sessionid, logclass, verbosity
        present = _filter                # enabled(), without the call: nearly all messages end here
        known = present.levels.get(logclass)
        if verbosity > (present.effective(logclass) if known is None else known):
            return
        if _throttle is not None and not _throttle(logclass, msg):
            return
        session = sessionid or thread_session()
        if not session.isprintable() or _escape_high:
            session = _clean(session)
        _sink(logclass, verbosity, session, _formatted(msg, args))
    except Exception as problem:
        _report_bad_call(sessionid, msg, problem)


def log_always(tag: str, level: int, text: str) -> None:
    """Write a message without session part at any verbosity: the last words of an instance."""
    _sink(tag, level, None, _clean(text))


def log_exception(session_id: str | None = None, level: int = 2) -> None:
    """Write the traceback of the exception being handled, a line each."""
    log_traceback(sys.exc_info()[1], session_id, level)


def log_traceback(problem: BaseException | None, session_id: str | None = None, level: int = 2) -> None:
    """Write the traceback of an exception, a line each."""
    if problem is not None and enabled("core.error", level):
        for line in "".join(traceback.format_exception(problem)).splitlines():
            log(session_id, "core.error", level, "Traceback: %s", (line,))


def thread_session() -> str:
    """The session id of messages that name none: the thread's name, `nosession` for the main thread."""
    name = threading.current_thread().name
    return "nosession" if name == "MainThread" else name


def _report_bad_call(sessionid, msg, problem: Exception) -> None:
    session = str(sessionid or thread_session())
    _sink("core.error", 3, _clean(session),
          _clean(f"Unable to format log message; error='{_value(str(problem), True)}'"))
    _sink("core.error", 3, _clean(session), _formatted("%s", (str(msg),)))


def _formatted(msg: str, args) -> str:
    """Return the message with its arguments in it, fit to be written.

    Nearly always the arguments hold nothing that has to be changed, which one look at the whole
    shows: printable ASCII, short, and no quote but those of the text itself.
    """
    if type(args) is tuple:
        try:
            text = msg % args
        except (TypeError, ValueError):          # bytes for %d and the like
            return _clean(_formatted_one_by_one(msg, args))
        if text.isascii() and len(text) <= VALUE_BYTES:
            own = _quotes_of.get(msg)
            if text.encode().translate(None, _HARMLESS) == (_own_quotes(msg) if own is None else own):
                return text
    return _clean(_formatted_one_by_one(msg, args))


_HARMLESS = bytes(set(range(0x20, 0x7F)) - {ord("'")})      # what may stand in a line wherever it comes from
_quotes_of: dict[str, bytes] = {}        # text of a message: its quotes, all that may be left when these are taken out


def _own_quotes(msg: str) -> bytes:
    own = b"'" * msg.count("'")
    if len(_quotes_of) < _MAX_KNOWN_TEXTS and len(msg) <= VALUE_BYTES:
        _quotes_of[msg] = own
    return own


def _formatted_one_by_one(msg: str, args) -> str:
    if not msg.isascii():
        msg = _readable(msg)
    if args is None:
        return msg
    if isinstance(args, dict):
        return msg % {key: _value(_plain(arg), "'" in msg) for key, arg in args.items()}
    values = [arg if type(arg) in _PLAIN_TYPES else _plain(arg)
              for arg in (args if isinstance(args, tuple) else (args,))]
    texts = "".join([value for value in values if type(value) is str])
    if not texts.isascii() or "'" in texts or len(texts) > VALUE_BYTES:      # seldom: look at each
        values = [_value(value, "'" in msg) for value in values]
    return msg % tuple(values)


_PLAIN_TYPES = frozenset({int, str})


def _plain(arg):
    """An argument as text; numbers stay numbers for %d."""
    if isinstance(arg, (int, float)):
        return arg
    return arg.decode("latin-1") if isinstance(arg, (bytes, bytearray)) else str(arg)


def _value(arg, quoted: bool):
    """An argument as it may be written: cut, readable, and without the quote that ends it."""
    if not isinstance(arg, str):
        return arg
    if len(arg) > VALUE_BYTES:
        arg = arg[:VALUE_BYTES] + _CUT_MARK if arg.isascii() else _readable(arg[:VALUE_BYTES]) + _CUT_MARK
    elif not arg.isascii():
        arg = _readable(arg)
    if _is_structured:
        return arg.replace("'", QUOTE)
    return arg.replace("'", "<27>") if quoted else arg


def _readable(text: str) -> str:
    """Bytes of text as the UTF-8 they are, <XX> for what is not; text beyond bytes as it is."""
    try:
        return text.encode("latin-1").decode("utf-8", "zorp-hex")
    except UnicodeEncodeError:
        return text


def _clean(text: str) -> str:
    return text if _is_structured or (text.isprintable() and not _escape_high) else escaped(text)


def escaped(text: str) -> str:
    """Return a text as the classic line has it: one line, whatever is in it."""
    if QUOTE in text:
        text = text.replace(QUOTE, "<27>" if "'" in text else "'")
    if _escape_high and not text.isascii():
        text = _OVER_7F.sub(_as_bytes, text)
    return text if text.isprintable() else _CONTROL.sub(_as_bytes, text)


def _as_bytes(found: re.Match) -> str:
    return "".join(f"<{byte:02X}>" for byte in found[0].encode("utf-8", "backslashreplace"))


codecs.register_error("zorp-hex", lambda problem: (
    "".join(f"<{byte:02X}>" for byte in problem.object[problem.start:problem.end]), problem.end))
