"""Matchers: does a text (a URL, a mail address, an IP address) belong to a set?

    MatcherPolicy("bad_urls", RegexpFileMatcher("/etc/zorp/bad_urls.txt"))
    MatcherPolicy("blocked", CombineMatcher((Z_AND, "bad_urls", (Z_NOT, "exceptions"))))

Theory of operation
    checkMatch(str) answers TRUE or FALSE in the session's own thread.  A matcher that cannot
    decide raises MatcherException, which its callers treat as a refusal.

    Policies may refer to matchers by names that are defined later: validateMatchers() runs
    after the instance functions and resolves them; an unknown name or a circle of names fails
    the load.

    Texts have one character per byte; a character above U+00FF, which only a policy can bring
    in, stands for its UTF-8 bytes.  Patterns know ASCII letters only (see Zorp.matching.patterns).

Guarantees
    A search is bounded: the text by max_subject_length, and where the package `regex` is
    installed each risky pattern by a time limit.  A look-up of host names waits for one query
    time.  Beyond either bound MatcherException is raised.

Deviations from the original
    A bad pattern fails the load.  In a file it does so too; in a file that changes later it
    keeps all patterns as they were, because a list without one of its lines would let pass
    what the administrator forbade.  Empty lines do not end a file, "#" begins a comment line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import smtplib
import stat
import threading

from Zorp import Globals
from Zorp.Cache import TimedCache
from Zorp.Constants import CORE_DEBUG, CORE_ERROR, CORE_INFO, CORE_POLICY, FALSE, TRUE, Z_AND, Z_EQ, Z_NOT, Z_OR, Z_XOR
from Zorp.Exceptions import MatcherException, PolicyError
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Log import log
from Zorp.matching.host_names import address_from_text, host_name
from Zorp.matching.patterns import (
    PatternTimeout,
    Repetition,
    byte_pattern,
    compile_pattern,
    regex,
    repetition,
    set_of_another_dialect,
)
from Zorp.matching.recipient_probe import (
    ProbeFailed,
    RecipientProbe,
    SenderRefused,
    SharedProbes,
    Verdict,
    address_bytes,
)
from Zorp.ResolverCache import DNSResolver, ResolverCache

_FILE_BYTES = 64 * 1024 * 1024
_BYTE_ORDER_MARK = "\xef\xbb\xbf"

Text = str                     # the parameter `str` of checkMatch() hides the type

__all__ = [
    "AbstractMatcher", "CombineMatcher", "DNSMatcher", "MatcherException", "MatcherPolicy", "RegexpFileMatcher",
    "RegexpMatcher", "SmtpInvalidRecipientMatcher", "SmtpProto", "WindowsUpdateMatcher", "getMatcher",
    "validateMatchers",
]


class UnusableMatcher(PolicyError, MatcherException):
    """A matcher policy that refers to nothing, or to itself; found when the policy is complete."""

    def __init__(self, problem, *, remedy, place):
        super().__init__(problem, remedy=remedy, place=place)
        self.detail = problem

    def __str__(self):
        return f"{self.problem}; {self.remedy}"


class AbstractMatcher:
    """What a matcher can do; sites derive their own from it."""

    def checkMatch(self, str):
        """Return TRUE when the text belongs to the set; raises MatcherException when that cannot be decided."""
        raise NotImplementedError

    def validateMatcher(self):
        """Check references to other matchers, once the policy is complete; raises MatcherException."""


class MatcherPolicy:
    """A matcher under a name, which proxies and other matchers refer to."""

    def __init__(self, name, matcher):
        arguments.name("MatcherPolicy", "name", name)
        if not isinstance(matcher, (AbstractMatcher, MatcherPolicy, str)):
            raise arguments.invalid(f"MatcherPolicy '{name}'", "matcher", matcher,
                                    "give a matcher object, with parentheses, or the name of a MatcherPolicy")
        if name in Globals.matchers:
            raise PolicyError(f"Duplicate matcher policy: {name}", remedy="give each matcher policy its own name")
        self.name = name
        self.matcher = matcher
        self._declared_at = str(policy_caller())
        Globals.matchers[name] = self

    def validateMatcher(self):
        """Check the matcher; raises MatcherException, which is a PolicyError too."""
        try:
            getMatcher(self.matcher).validateMatcher()
        except MatcherException as problem:
            raise UnusableMatcher(
                problem.detail, place=self._declared_at,
                remedy=f"correct MatcherPolicy '{self.name}', or define what it refers to") from None


def getMatcher(matcher_or_name_or_whatever):
    """Return the matcher that an object, a policy or the name of a policy stands for; raises MatcherException."""
    given = matcher_or_name_or_whatever
    if isinstance(given, AbstractMatcher):
        return given
    if isinstance(given, str):
        if given not in Globals.matchers:
            raise MatcherException(f"No such matcher; matcher='{given}'")
        given = Globals.matchers[given]
    if isinstance(given, MatcherPolicy) and isinstance(given.matcher, AbstractMatcher):
        return given.matcher
    raise MatcherException("Matcher is of invalid type")


def validateMatchers():
    """Check all matcher policies; raises MatcherException for the first that refers to nothing."""
    for policy in Globals.matchers.values():
        policy.validateMatcher()


def _subject(value, most_characters):
    """Return the text to search, one character per byte; raises MatcherException."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        raise MatcherException(f"Only text can be matched, not {type(value).__name__}")
    if len(value) > most_characters:
        raise MatcherException(f"Text too long to be matched; length='{len(value)}', limit='{most_characters}'")
    try:
        value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass").decode("latin-1")
    return value


# ---------------------------------------------------------------------------- regular expressions

class RegexpMatcher(AbstractMatcher):
    """Regular expressions, found anywhere in the text.

    Arguments:
        match_list: patterns one of which has to be found.
        ignore_list: patterns none of which may be found.
        ignore_case: TRUE: upper and lower case ASCII letters are the same.

    `match` and `ignore` are lists of (compiled pattern, text).  Expressions are not anchored:
    write `(^|\\.)bank\\.example$`, because `bank.example` also matches evilbank.example.x.
    Raises ValueError("Error compiling regular expression; ...").
    """

    max_subject_length = 4096          # characters; a longer text cannot be decided

    def __init__(self, match_list=None, ignore_list=None, ignore_case=TRUE):
        self.ignore_case = arguments.flag("RegexpMatcher", "ignore_case", ignore_case)
        is_text = not policy_caller().is_legacy
        self.match = [self._entry(pattern, is_text=is_text) for pattern in _patterns(match_list)]
        self.ignore = [self._entry(pattern, is_text=is_text) for pattern in _patterns(ignore_list)]

    def _entry(self, pattern, *, is_text):
        pattern = pattern.rstrip()
        if is_text:
            try:
                return self.compilePattern(byte_pattern(pattern)), pattern
            except re.error as problem:
                raise _bad_pattern(pattern, problem) from None
        return self.compilePattern(pattern), pattern

    def compilePattern(self, pat):
        """Return the compiled form of a pattern; raises ValueError."""
        try:
            compiled = compile_pattern(pat, ignore_case=bool(self.ignore_case))
        except re.error as problem:
            raise _bad_pattern(pat, problem) from None
        if repetition(pat) is Repetition.NESTED:
            log(None, CORE_POLICY, 2 if regex is None else 3,
                "Nested repetition in regular expression, matching may take long; expr='%s', limited='%s'",
                (pat, "no, install the package regex" if regex is None else "yes"))
        if (found := set_of_another_dialect(pat)) is not None:
            log(None, CORE_POLICY, 3,
                "Set of another dialect in regular expression, taken for single characters; set='%s', expr='%s'",
                (found, pat))
        return compiled

    def checkMatch(self, str):
        """Return whether a pattern of `match` is found in the text and none of `ignore`; raises MatcherException."""
        subject = _subject(str, self.max_subject_length)
        try:
            hit = next((text for pattern, text in self.match if pattern.search(subject)), None)
            if hit is None or any(pattern.search(subject) for pattern, _ in self.ignore):
                return FALSE
        except PatternTimeout as problem:
            log(None, CORE_ERROR, 3, "Matching took too long; str='%s', pattern='%s'", (subject, problem))
            raise MatcherException("Matching took too long") from None
        log(None, CORE_POLICY, 4, "Matching regexp found; str='%s', pattern='%s'", (subject, hit))
        return TRUE


def _patterns(given):
    """Return the patterns of a list argument, which may also be one pattern."""
    remedy = "give a list of patterns, each one a text"
    patterns = arguments.items("RegexpMatcher", "pattern list", given, remedy)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PolicyError(f"Error compiling regular expression; expr={pattern!r}", remedy=remedy)
    return patterns


def _bad_pattern(pattern, problem):
    text = f"Error compiling regular expression; expr='{pattern}'"
    log(None, CORE_POLICY, 3, "Error compiling regular expression; expr='%s'", (pattern,))
    return PolicyError(text, remedy=f"put the pattern right: {problem}")


@dataclasses.dataclass(frozen=True, slots=True)
class _FileState:
    """By what we notice that a file is another one."""

    modified_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, state):
        return cls(state.st_mtime_ns, state.st_size, state.st_ino)


class RegexpFileMatcher(RegexpMatcher):
    """Regular expressions from files, one per line, without regard to case.

    Arguments:
        match_fname: patterns one of which has to be found.
        ignore_fname: patterns none of which may be found.

    A line's end is stripped of blanks; empty lines and lines that begin with "#" do not count
    (write `\\#` for a pattern that begins so).  A changed file counts from the next check on.
    A file that is missing or cannot be used is logged once, and its old patterns stay.
    `match_date` and `ignore_date` are the files' times of change in whole seconds, 0: not read.

    _files_lock guards reading; `match` and `ignore` are replaced as a whole.
    """

    def __init__(self, match_fname=None, ignore_fname=None):
        super().__init__()
        self.match_file = _file_name("match_fname", match_fname)
        self.ignore_file = _file_name("ignore_fname", ignore_fname)
        self.match_date = self.ignore_date = 0
        self._states = {"match": ..., "ignore": ...}      # what was seen last; None: no file
        self._files_lock = threading.Lock()
        self._refresh()

    def checkMatch(self, str):
        """Return whether a pattern of the match file is found in the text and none of the ignore file."""
        with contextlib.suppress(PolicyError):            # logged; the old patterns stay
            self._refresh()
        return super().checkMatch(str)

    def readFile(self, filename, array):
        """Append (compiled pattern, text) of each line of a file to `array`; raises OSError, ValueError."""
        self._read(filename, array)

    def _refresh(self):
        for kind, filename in (("match", self.match_file), ("ignore", self.ignore_file)):
            if filename and _state_of(filename) != self._states[kind]:
                with self._files_lock:
                    if _state_of(filename) != self._states[kind]:
                        self._reload(kind, filename)

    def _reload(self, kind, filename):
        entries = []
        self._states[kind] = _state_of(filename)          # also of a file that turns out to be unusable
        try:
            state = self._read(filename, entries)
        except OSError as problem:
            log(None, CORE_POLICY, 3, f"Error opening {kind} file; filename='%s', error='%s'",
                (filename, problem.strerror or problem))
            return
        self._states[kind] = _FileState.of(state)
        setattr(self, kind, entries)
        setattr(self, f"{kind}_date", int(state.st_mtime))

    def _read(self, filename, array):
        """Append the file's patterns; return its state from before the first byte was read."""
        descriptor = os.open(filename, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, encoding="latin-1") as file:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode) or state.st_size > _FILE_BYTES:
                raise OSError("not a regular file of reasonable size")
            for number, line in enumerate(file.read(_FILE_BYTES).removeprefix(_BYTE_ORDER_MARK).split("\n"), 1):
                pattern = line.rstrip()
                if pattern and not pattern.startswith("#"):
                    array.append(self._file_entry(filename, number, pattern))
        return state

    def _file_entry(self, filename, number, pattern):
        try:
            return self.compilePattern(pattern), pattern
        except PolicyError as problem:
            raise PolicyError(f"{problem.problem}, file='{filename}', line='{number}'",
                              remedy=problem.remedy) from None


def _file_name(argument, value):
    """Return the name of a file as text, None for none."""
    if isinstance(value, (bytes, os.PathLike)):
        value = os.fsdecode(value)
    return arguments.text("RegexpFileMatcher", argument, value, "give the name of a file") if value else None


def _state_of(filename):
    try:
        return _FileState.of(os.stat(filename))
    except OSError:
        return None


# ---------------------------------------------------------------------------- logic

def _parity(values):
    return sum(values) % 2 == 1


def _all_equal(values):
    return len(set(values)) <= 1


_OPERATORS = {                   # all() and any() stop at the first decisive argument
    Z_NOT: lambda values: not next(values),
    Z_AND: all,
    Z_OR: any,
    Z_XOR: _parity,
    Z_EQ: _all_equal,
}


class CombineMatcher(AbstractMatcher):
    """Other matchers joined by logic: a tuple of an operator and its arguments.

    An argument is a matcher, a MatcherPolicy, the name of one, or another such tuple.  Z_NOT
    has one argument, the others one or more; Z_XOR is true for an odd number of true ones,
    Z_EQ when all are equal.  Z_NE is Z_XOR under another name.

    `op` is the operator, `arg` the list of arguments.  Raises MatcherException.
    """

    def __init__(self, expr):
        if not isinstance(expr, (list, tuple)) or not expr:
            raise MatcherException("Missing operator in CombineMatcher expression")
        self.op, *arguments = expr
        count = len(arguments)
        if not isinstance(self.op, str) or self.op not in _OPERATORS:
            raise MatcherException(f"Invalid operator {self.op} in CombineMatcher expression")
        if count < 1 or (self.op == Z_NOT and count != 1):
            raise MatcherException(
                f"Invalid number of arguments ({count}) for operator {self.op} in CombineMatcher expression")
        self.arg = [CombineMatcher(argument) if isinstance(argument, (tuple, list)) else argument
                    for argument in arguments]
        self._resolved = None

    def validateMatcher(self):
        """Resolve names; raises MatcherException for an unknown one and for a circle."""
        self._resolve(())

    def checkMatch(self, str):
        """Return the value of the expression for the text; raises MatcherException."""
        if self._resolved is None:
            self._resolve(())
        return TRUE if _OPERATORS[self.op](bool(matcher.checkMatch(str)) for matcher in self._resolved) else FALSE

    def _resolve(self, path):
        if self in path:
            raise MatcherException("Matchers refer to each other in a circle")
        if self._resolved is not None:
            return
        resolved = [getMatcher(argument) for argument in self.arg]
        for matcher in resolved:
            if isinstance(matcher, CombineMatcher):
                matcher._resolve((*path, self))
            else:
                matcher.validateMatcher()
        self._resolved = resolved


# ---------------------------------------------------------------------------- host names

class DNSMatcher(AbstractMatcher):
    """IP addresses, as text, of some host names.

    Arguments:
        hosts: one host name or a list of them.
        server: IP address of the name server to ask, with ":port" if it is not 53; None: those of this host.

    The names are resolved at the first check and when their TTL has passed; addresses outlive
    a name server that does not answer by an hour.  Whoever controls a name, or shares a large
    host with it, controls the answer: prefer matchers on server names where there are any.
    """

    def __init__(self, hosts, server=None):
        remedy = "give DNSMatcher a host name or a list of them"
        names = arguments.items("DNSMatcher", "hosts", hosts, remedy)
        for name in names:
            if not isinstance(name, str) or host_name(name) is None:
                raise PolicyError(f"Invalid host name; host='{name}'", remedy=remedy)
        self.server = server
        self.cache = ResolverCache(DNSResolver(server))
        for name in names:
            self.cache.watch(name)

    def checkMatch(self, str):
        """Return whether one of the names has this address.

        Raises MatcherException while no answer to the first queries has come.
        """
        if not isinstance(str, Text) or address_from_text(str) is None:
            return FALSE
        if self.cache.lookupAddress(str):
            return TRUE
        if not self.cache.is_answered():
            raise MatcherException("Host names are not resolved yet")
        return FALSE

    @property
    def hosts(self):
        """The set of host names."""
        return self.cache.hosts

    @property
    def expires(self):
        """When each name expires, as time.time() counts."""
        return self.cache.expires

    @property
    def cache_name_to_addresses(self):
        """(set of IPv4 texts, set of IPv6 texts) of each host name."""
        return self.cache.cache_name_to_addresses

    @property
    def cache_address_to_names(self):
        """The set of names of each known address."""
        return self.cache.cache_address_to_names

    def addHostToCache(self, host, addresses):
        """Watch a host and take these addresses (texts) for it until the default timeout."""
        self.cache.put(host, addresses)

    def dropHostFromCache(self, host):
        """Forget a host."""
        self.cache.removeHost(host)

    def updateCachedHost(self, host, now):
        """Look a host up if it has expired at `now`, a time as time.time() gives it."""
        self.cache.updateHostIfNeeded(host, now)

    def updateCache(self, now):
        """Look up all hosts that have expired at `now`."""
        self.cache.update(now)

    def fillCache(self, now=None):
        """Look up all hosts that have expired."""
        self.cache.update(now)


class WindowsUpdateMatcher(DNSMatcher):
    """The addresses of three names that Windows Update once had; kept for policies that use it."""

    def __init__(self, server=None):
        super().__init__(("v4.windowsupdate.microsoft.nsatc.net", "v5.windowsupdate.microsoft.nsatc.net",
                          "update.microsoft.com.nsatc.net"), server)


# ---------------------------------------------------------------------------- mail recipients

class SmtpProto(smtplib.SMTP):
    """A client of the Python library that can be bound to a local address; for policies of their own."""

    def __init__(self, host="", port=0, local_hostname=None, bind_addr=""):
        self.bind_addr = bind_addr
        super().__init__(host, port, local_hostname, timeout=30, source_address=(bind_addr, 0) if bind_addr else None)

    def connect(self, host="localhost", port=0):
        """Connect from the local address; returns the greeting as (code, text)."""
        return super().connect(host, port)


class SmtpInvalidRecipientMatcher(AbstractMatcher):
    """Mail addresses that a mail server does not accept: TRUE means the recipient is invalid.

    Arguments:
        server_name, server_port: the server that knows; all its addresses are tried.
        cache_timeout: seconds for which an accepted recipient is remembered.
        attempt_delivery: ignored.
        force_delivery_attempt: TRUE: do not use VRFY, begin a mail instead.
        sender_address: sender of that mail.
        bind_name: local host name or address to connect from.
        refused_cache_timeout: seconds for which a refused recipient is remembered; 0: not at all.
        timeout: seconds for each step of the dialogue.

    MatcherException means that the server gave no answer that counts: it cannot be reached,
    it answers "try later", or the address could not be sent safely.
    """

    def __init__(self, server_name, server_port=25, cache_timeout=60, attempt_delivery=FALSE,
                 force_delivery_attempt=FALSE, sender_address="<>", bind_name="", *,
                 refused_cache_timeout=0, timeout=30):
        owner = "SmtpInvalidRecipientMatcher"
        sender_address = arguments.text(owner, "sender_address", sender_address)
        if sender_address not in ("", "<>") and address_bytes(sender_address) is None:
            raise PolicyError(f"Invalid sender address; sender_address='{sender_address}'",
                              remedy="give a mail address, or '<>' for none")
        self.server_name = _host("server_name", server_name)
        self.server_port = arguments.whole_number(owner, "server_port", server_port,
                                                  least=1, most=arguments.LARGEST_PORT)
        self.force_delivery_attempt = arguments.flag(owner, "force_delivery_attempt", force_delivery_attempt)
        self.bind_name = _host("bind_name", bind_name) if bind_name else ""
        self.sender_address = sender_address
        cache_timeout, refused_cache_timeout, timeout = (
            arguments.number(owner, argument, value, least=least, most=arguments.LONGEST_SECONDS, unit="seconds")
            for argument, value, least in (("cache_timeout", cache_timeout, 0),
                                           ("refused_cache_timeout", refused_cache_timeout, 0),
                                           ("timeout", timeout, 0.001)))
        self.cache = TimedCache(f"smtp_valid_recipients({server_name})", cache_timeout, FALSE)
        self._refused = TimedCache(f"smtp_invalid_recipients({server_name})", refused_cache_timeout, FALSE)
        self._remembers_refused = refused_cache_timeout > 0
        self._timeout = timeout
        self._probes = SharedProbes(self._new_probe)

    def checkMatch(self, email):
        """Return TRUE when the server refuses the recipient, FALSE when it accepts it; raises MatcherException."""
        if not isinstance(email, str):
            raise MatcherException(f"Only text can be matched, not {type(email).__name__}")
        known = self.cache.lookup(email) or self._refused.lookup(email)
        if known is not None:
            is_invalid = known is Verdict.REFUSED
            log(None, CORE_DEBUG, 6, "Cached recipient match found; email='%s', cached='%d'", (email, is_invalid))
            return TRUE if is_invalid else FALSE
        log(None, CORE_DEBUG, 6, "Recipient validity not cached, trying the direct way; email='%s'", (email,))
        if self._ask_server(email) is Verdict.ACCEPTED:
            log(None, CORE_INFO, 5, "Server accepted recipient; email='%s'", (email,))
            self.cache.store(email, Verdict.ACCEPTED)
            return FALSE
        log(None, CORE_INFO, 4, "Server rejected recipient; email='%s'", (email,))
        if self._remembers_refused:
            self._refused.store(email, Verdict.REFUSED)
        return TRUE

    def _ask_server(self, email):
        try:
            return self._probes.ask(email)
        except SenderRefused:
            log(None, CORE_ERROR, 3, "SMTP sender was rejected, unable to verify user existence; email='%s', "
                "server_address='%s', server_port='%d'", (email, self.server_name, self.server_port))
            raise MatcherException(f"Server has not accepted our sender ({self.sender_address}).") from None
        except ProbeFailed as problem:
            log(None, CORE_ERROR, 3, "SMTP error during recipient validity checking; info='%s'", (problem,))
            raise MatcherException(problem.verdict_text) from None

    def _new_probe(self):
        return RecipientProbe(
            self.server_name, self.server_port, bind_name=self.bind_name, sender=self.sender_address,
            tries_vrfy=not self.force_delivery_attempt, step_seconds=self._timeout)


def _host(argument, value):
    """Return a host name or an address."""
    if not isinstance(value, str) or (address_from_text(value) is None and host_name(value) is None):
        raise arguments.invalid("SmtpInvalidRecipientMatcher", argument, value, "give a host name or an IP address")
    return value
