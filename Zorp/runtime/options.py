"""The command line of zorp, read once into a frozen value.

Theory of operation
    OPTIONS is the table of everything that any release has known.  parse() walks the arguments
    by the rules of the original's option parser: `--long=VALUE`, `--long VALUE`, `-sVALUE`,
    `-s VALUE`, bundled flags, `--` ends the options, long names are never abbreviated, the last
    of several wins.  What no longer has a meaning is accepted with a warning, because
    instances.conf files carry options of twenty years; what nobody ever knew is an error.

    Nothing here touches the system: paths are made absolute against a given directory, the
    rest stays as it was written.

Verbosity has three forms, all of them in the field: `-v N`, a bare `-v` that adds one, `-vvv`.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from typing import NamedTuple

from Zorp.wire.kzorpd import KZORPD_DIR

DEFAULT_VERBOSITY = 3
DEFAULT_LOG_SPEC = "*.summary:4,*.accounting:4"
DEFAULT_CAPS = "cap_net_bind_service=p cap_net_raw=ip"
MAX_ALIASES = 128


class Mode(enum.Enum):
    """How the process lives; the values are those of --process-mode."""

    FOREGROUND = "foreground"
    BACKGROUND = "background"
    SAFE_BACKGROUND = "safe-background"
    SYSTEMD_NOTIFY = "systemd-notify"

    @property
    def detached(self) -> bool:
        """True when the command returns while the instance goes on."""
        return self in (Mode.BACKGROUND, Mode.SAFE_BACKGROUND)

    @property
    def restarts(self) -> bool:
        """True when a crashed worker is replaced; `background` was always without that."""
        return self is not Mode.BACKGROUND


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the administrator asked for.  Times are seconds, sizes carry their unit in the name."""

    function: str = "zorp"               # of --as: what of the policy to call, and the default of the names below
    also_as: tuple[str, ...] = ()
    virtual_name: str = ""               # of --master or --slave: NAME or NAME#k; empty: derived from the function
    is_master: bool = True
    processes: int = 0                   # 0: one process of the name above; N: NAME#0 to NAME#N-1
    policy: str = "/etc/zorp/policy.py"
    verbosity: int = DEFAULT_VERBOSITY
    syslog: bool = True
    log_spec: str = DEFAULT_LOG_SPEC
    log_escape: bool = False
    log_severity: bool = False
    log_secrets: bool = False
    log_format: str = "classic"
    log_rate: int = 0                    # lines per second with the same text; 0: all
    log_socket: str = "/dev/log"
    threads: int = 1000
    idle_threads: int = 8
    stack_kib: int | None = None
    mode: Mode = Mode.SAFE_BACKGROUND
    user: str | None = None
    group: str | None = None
    chroot: str | None = None
    caps: str = DEFAULT_CAPS
    no_caps: bool = False
    pid_file: str | None = None
    pid_dir: str = "/var/run/zorp"
    state_dir: str = "/var/lib/zorp"
    kzorpd_dir: str = KZORPD_DIR
    enable_core: bool = False
    fd_limit: int = 256_000
    restart_max: int = 5
    restart_interval: int = 60
    notify_interval: int = 600
    failure_hook: str = "/usr/libexec/libzorpll/failure_notify"
    deadlock_timeout: int = 60           # negative: no check
    shutdown_grace: int = 0
    drain_timeout: int = 86_400          # how long sessions of a replaced policy may go on
    reload_patience: int = 10            # how long a load goes on when a newer reload waits
    session_id_format: str = "7"
    packet_rules: str = "auto"           # who sees to packet rules, see Zorp.runtime.packetrules
    question: str = ""                   # of --explain
    json: bool = False                   # its answer as JSON
    action: str = "run"                  # "run", "check", "describe", "explain", "version" or the name of a help text
    warnings: tuple[str, ...] = ()       # for stderr, before daemonising
    obsolete: tuple[str, ...] = ()       # options that are accepted and have no effect

    @property
    def instance(self) -> str:
        """The name of the instance on this host: of processes, files, sockets, packet rules and log."""
        return self.virtual_name.partition("#")[0] or self.function

    @property
    def process_names(self) -> tuple[str, ...]:
        """The virtual instance names of the workers, worker 0 first."""
        if self.processes:
            return tuple(f"{self.instance}#{index}" for index in range(self.processes))
        return (self.virtual_name or self.instance,)

    @property
    def names(self) -> list[str]:
        """The functions of the policy to call, in order."""
        return [self.function, *self.also_as]


class UsageError(Exception):
    """The command line cannot be used; `str()` is the line for stderr, exit status 1."""


class Option(NamedTuple):
    """One row of the table.  `kind` says what follows the name and what happens to it."""

    long: str
    short: str
    kind: str                 # flag, text, int, ... : a method _take_<kind> of the parser
    field: str
    value: object = None      # what a flag stores
    metavar: str = ""
    help: str = ""            # empty: not shown
    group: str = "main"


OPTIONS = (
    Option("as", "a", "text", "function", None, "NAME", "instance to start; also the policy function to call"),
    Option("also-as", "A", "alias", "also_as", None, "NAME", "a further policy function to call; may be repeated"),
    Option("master", "", "virtual", "virtual_name", True, "VNAME",
           "virtual instance name; the part before # is that of the instance, --as only names the function", "process"),
    Option("slave", "", "virtual", "virtual_name", False, "VNAME", "virtual instance name, not the first", "process"),
    Option("num-of-processes", "", "int", "processes", (1, 256), "N", "worker processes side by side", "process"),
    Option("policy", "p", "text", "policy", None, "FILE", "policy file"),
    Option("check-policy", "", "optional_text", "check_policy", None, "FILE",
           "load this policy (default: that of --policy), bind nothing, report"),
    Option("check", "", "optional_text", "check_policy"),
    Option("describe", "", "action", "action", "describe", "",
           "load the policy, bind nothing, print what it wants from the packet filter as JSON"),
    Option("explain", "", "question", "question", None, "QUESTION",
           'load the policy and say what it does with "tcp CLIENT[:PORT] SERVER:PORT [IFACE]" or "service NAME"'),
    Option("json", "", "flag", "json", True, "", "the answer to --explain as JSON"),
    Option("version", "V", "action", "action", "version", "", "print the version"),
    Option("help", "h", "action", "action", "main", "", "this text"),
    Option("help-all", "", "action", "action", "all", "", "all options"),
    Option("help-process", "", "action", "action", "process", "", "options about the process"),
    Option("help-thread", "", "action", "action", "thread", "", "options about threads"),
    Option("help-log", "", "action", "action", "log", "", "options about the log"),
    Option("", "?", "action", "action", "main"),
    # log
    Option("verbose", "v", "verbosity", "verbosity", None, "N", "verbosity 0 to 10 (3)", "log"),
    Option("no-syslog", "l", "flag", "syslog", False, "", "log to stderr, stay in the foreground", "log"),
    Option("log-spec", "s", "text", "log_spec", None, "SPEC", "verbosity per category", "log"),
    Option("logspec", "", "text", "log_spec"),
    Option("log-tags", "T", "nothing", "", None, "", "accepted; tags are always written", "log"),
    Option("log-escape", "", "flag", "log_escape", True, "", "write bytes over 0x7F as <XX>", "log"),
    Option("log-severity", "", "flag", "log_severity", True, "", "map levels to syslog severities", "log"),
    Option("log-secrets", "", "flag", "log_secrets", True, "", "do not hide passwords in debug lines", "log"),
    Option("log-format", "", "choice", "log_format", ("classic", "rfc5424", "json"), "FORM",
           "classic, rfc5424 or json", "log"),
    Option("log-rate", "", "int", "log_rate", (0, 1_000_000), "N", "lines per second with the same text", "log"),
    Option("log-socket", "", "text", "log_socket", None, "PATH", "socket of the system log (/dev/log)", "log"),
    Option("session-id-format", "", "choice", "session_id_format", ("3", "5", "7", "short"), "FORM",
           "form of session ids: 3, 5, 7 or short", "log"),
    # threads
    Option("threads", "t", "int", "threads", (1, 1_000_000), "N", "most sessions at a time (1000)", "thread"),
    Option("idle-threads", "I", "int", "idle_threads", (1, 1_000_000), "N", "threads kept ready", "thread"),
    Option("stack-size", "S", "stack", "stack_kib", None, "KIB", "stack of a thread", "thread"),
    Option("threadpools", "O", "obsolete", ""),
    # process
    Option("foreground", "F", "flag", "mode", Mode.FOREGROUND, "", "stay in the foreground", "process"),
    Option("process-mode", "", "mode", "mode", None, "MODE",
           "foreground, background, safe-background or systemd-notify", "process"),
    Option("user", "u", "text", "user", None, "USER", "run as this user", "process"),
    Option("uid", "", "text", "user"),
    Option("group", "g", "text", "group", None, "GROUP", "run as this group", "process"),
    Option("gid", "", "text", "group"),
    Option("chroot", "R", "path", "chroot", None, "DIR", "change the root directory", "process"),
    Option("caps", "C", "text", "caps", None, "CAPS", "capabilities to keep", "process"),
    Option("no-caps", "N", "flag", "no_caps", True, "", "leave capabilities alone", "process"),
    Option("pidfile", "P", "text", "pid_file", None, "FILE", "pid file", "process"),
    Option("pid-dir", "", "path", "pid_dir", None, "DIR", "directory of pid files and control sockets", "process"),
    Option("state-dir", "", "path", "state_dir", None, "DIR", "directory of lasting state", "process"),
    Option("kzorpd-dir", "", "path", "kzorpd_dir", None, "DIR", "directory of kzorpd's socket", "process"),
    Option("packet-rules", "", "choice", "packet_rules", ("auto", "kzorpd", "administrator", "none"), "WAY",
           "who sees to packet rules: auto, kzorpd, administrator or none", "process"),
    Option("enable-core", "", "flag", "enable_core", True, "", "allow core dumps", "process"),
    Option("fd-limit-min", "", "int", "fd_limit", (0, 100_000_000), "N", "descriptors of a process", "process"),
    Option("fd-limit-threshold", "", "fd_threshold", ""),
    Option("restart-max", "", "int", "restart_max", None, "N", "restarts within the interval (5)", "process"),
    Option("restart-interval", "", "int", "restart_interval", None, "SEC", "see --restart-max (60)", "process"),
    Option("notify-interval", "", "int", "notify_interval", None, "SEC", "least time between failure hooks", "process"),
    Option("notify_interval", "", "int", "notify_interval"),
    Option("failure-hook", "", "path", "failure_hook", None, "FILE", "program to run when a worker fails", "process"),
    Option("deadlock-check-timeout", "", "int", "deadlock_timeout", None, "SEC",
           "how soon a worker must answer; negative: do not ask", "process"),
    Option("shutdown-grace", "", "int", "shutdown_grace", (0, 1_000_000), "SEC",
           "how long a stop waits for sessions (0)", "process"),
    Option("drain-timeout", "", "int", "drain_timeout", (0, 100_000_000), "SEC",
           "how long sessions may go on after a reload (86400)", "process"),
    Option("reload-patience", "", "int", "reload_patience", (0, 3_600), "SEC",
           "how long a load goes on when a newer one waits (10)", "process"),
    # of earlier releases, without effect
    Option("crypto-engine", "E", "obsolete_value", ""),
    Option("tproxy", "Y", "obsolete_value", ""),
    Option("autobind-ip", "B", "obsolete_value", ""),
    Option("process-limit", "", "obsolete_value", ""),
    Option("fd-limit", "", "int", "fd_limit", (0, 100_000_000)),
    Option("auto-restart", "", "flag", "mode", Mode.SAFE_BACKGROUND),
    Option("no-auto-restart", "", "flag", "mode", Mode.BACKGROUND),
)
_BY_LONG = {option.long: option for option in OPTIONS if option.long}
_BY_SHORT = {option.short: option for option in OPTIONS if option.short}
_WITHOUT_VALUE = frozenset({"flag", "action", "nothing", "obsolete"})
_MAY_LACK_VALUE = frozenset({"verbosity", "optional_text"})


class _Parser:
    """One walk over the arguments; every _take_ method handles one kind of option."""

    def __init__(self, arguments: list[str]) -> None:
        self._rest = list(arguments)
        self._found: dict[str, object] = {}
        self._verbosity = DEFAULT_VERBOSITY
        self._warnings: list[str] = []
        self._obsolete: list[str] = []

    def parse(self) -> Options:
        while self._rest:
            argument = self._rest.pop(0)
            if argument == "--":
                break
            if argument.startswith("--"):
                self._long(argument)
            elif argument.startswith("-") and len(argument) > 1:
                self._short(argument)
            else:
                self._rest.insert(0, argument)
                break
        if self._rest:
            raise UsageError(f"{self._name}: Invalid arguments.\n{self._name}: '{self._rest[0]}' is neither an option "
                             "nor the value of one; options begin with - or --")
        return self._finish()

    @property
    def _name(self) -> str:
        return self._found.get("function", "zorp")

    def _long(self, argument: str) -> None:
        name, equals, value = argument[2:].partition("=")
        option = _BY_LONG.get(name)
        if option is None:
            raise UsageError(f"{self._name}: Unknown option {argument}")
        self._apply(option, f"--{name}", value if equals else None)

    def _short(self, argument: str) -> None:
        letters = argument[1:]
        while letters:
            option = _BY_SHORT.get(letters[0])
            if option is None:
                raise UsageError(f"{self._name}: Unknown option -{letters[0]}")
            shown, letters = f"-{letters[0]}", letters[1:]
            if option.kind == "verbosity" and letters.startswith("v"):      # -vvv
                self._take_verbosity(option, shown, "")
            elif option.kind in _WITHOUT_VALUE:
                self._apply(option, shown, None)
            else:
                self._apply(option, shown, letters or None)
                return

    def _apply(self, option: Option, shown: str, value: str | None) -> None:
        if option.kind in _WITHOUT_VALUE:
            if value is not None:
                raise UsageError(f"{self._name}: Unknown option {shown}={value}")
        elif value is None and option.kind not in _MAY_LACK_VALUE:
            if not self._rest:
                raise UsageError(f"{self._name}: Missing argument for {shown}")
            value = self._rest.pop(0)
        getattr(self, f"_take_{option.kind}")(option, shown, value)

    def _integer(self, shown: str, value: str) -> int:
        try:
            return int(value, 0)
        except ValueError:
            raise UsageError(f"{self._name}: Cannot parse integer value '{value}' for {shown}") from None

    def _take_flag(self, option: Option, shown: str, value: str | None) -> None:
        self._found[option.field] = option.value

    _take_action = _take_flag

    def _take_nothing(self, option: Option, shown: str, value: str | None) -> None:
        """Accepted and true anyway."""

    def _take_obsolete(self, option: Option, shown: str, value: str | None) -> None:
        self._obsolete.append(f"--{option.long}")

    _take_obsolete_value = _take_obsolete

    def _take_text(self, option: Option, shown: str, value: str) -> None:
        self._found[option.field] = value

    def _take_optional_text(self, option: Option, shown: str, value: str | None) -> None:
        if value is None and self._rest and not self._rest[0].startswith("-"):
            value = self._rest.pop(0)
        self._found[option.field] = value or ""

    def _take_question(self, option: Option, shown: str, value: str) -> None:
        self._found["question"] = value
        self._found["action"] = "explain"

    def _take_path(self, option: Option, shown: str, value: str) -> None:
        self._found[option.field] = os.path.abspath(value)

    def _take_int(self, option: Option, shown: str, value: str) -> None:
        number = self._integer(shown, value)
        if option.value is not None:
            low, high = option.value
            if not low <= number <= high:
                given, number = number, min(max(number, low), high)
                self._warnings.append(f"Value of {shown} must be {low} to {high}; value='{given}', used='{number}'")
        self._found[option.field] = number

    def _take_alias(self, option: Option, shown: str, value: str) -> None:
        names = (*self._found.get("also_as", ()), value)
        if len(names) > MAX_ALIASES:
            raise UsageError(f"{self._name}: Too many {shown} options; limit='{MAX_ALIASES}'")
        self._found["also_as"] = names

    def _take_virtual(self, option: Option, shown: str, value: str) -> None:
        self._found["virtual_name"] = value
        self._found["is_master"] = option.value

    def _take_choice(self, option: Option, shown: str, value: str) -> None:
        if value not in option.value:
            choices = ", ".join(option.value)
            raise UsageError(f"{self._name}: Invalid value '{value}' for {shown}, use one of {choices}")
        self._found[option.field] = value

    def _take_mode(self, option: Option, shown: str, value: str) -> None:
        try:
            self._found["mode"] = Mode(value)
        except ValueError:
            raise UsageError(f"{self._name}: Error parsing process-mode argument") from None

    def _take_verbosity(self, option: Option, shown: str, value: str | None) -> None:
        if value is None and self._rest and self._rest[0].lstrip("-").isdigit():
            value = self._rest.pop(0)
        if not value:
            self._verbosity += 1
            return
        number = self._integer(shown, value)
        if number == -1:                   # the original's word for "not given"
            number = DEFAULT_VERBOSITY
        self._verbosity = number

    def _take_stack(self, option: Option, shown: str, value: str) -> None:
        number = self._integer(shown, value)
        if 64 <= number <= 65_536:
            self._found["stack_kib"] = number
        else:
            self._warnings.append(f"Value of {shown} must be 64 to 65536, ignored; value='{number}'")

    def _take_fd_threshold(self, option: Option, shown: str, value: str) -> None:
        self._integer(shown, value)
        self._warnings.append("Setting fd-limit-threshold is deprecated, use fd-limit-min directly;")

    def _finish(self) -> Options:
        found = self._found
        clamped = min(max(self._verbosity, 0), 10)
        if clamped != self._verbosity:
            self._warnings.append(f"Verbosity must be 0 to 10; value='{self._verbosity}'")
        found["verbosity"] = clamped
        if found.get("syslog") is False:
            found["mode"] = Mode.FOREGROUND
        self._limit_restarts()
        if found.get("check_policy") is not None:
            found["policy"] = found.pop("check_policy") or found.get("policy", Options.policy)
            found["action"] = "check" if found.get("action", "run") == "run" else found["action"]
        found["policy"] = os.path.abspath(found.get("policy", Options.policy))
        return Options(**found, warnings=tuple(self._warnings), obsolete=tuple(dict.fromkeys(self._obsolete)))

    def _limit_restarts(self) -> None:
        most = self._found.get("restart_max", 5)
        corrected = 30 if most > 30 else 5 if most < 2 else most
        if corrected != most:
            self._warnings.append(f"Value of --restart-max must be 2 to 30; value='{most}', used='{corrected}'")
        interval = self._found.get("restart_interval", 60)
        least = max(5, 3 * corrected)
        if interval < least:
            self._warnings.append(
                f"Value of --restart-interval is too small for --restart-max; value='{interval}', used='{least}'")
        self._found["restart_max"] = corrected
        self._found["restart_interval"] = max(interval, least)


def parse(arguments: list[str]) -> Options:
    """Return what the arguments (without the program's name) ask for.

    Raises UsageError with the line for stderr; the exit status is 1 then.
    """
    return _Parser(arguments).parse()


def help_text(topic: str) -> str:
    """Return the usage text: topic "main", "all", or a group of options."""
    shown = [option for option in OPTIONS if option.help and (topic == "all" or option.group == topic)]
    lines = ["Usage:", "  zorp [OPTION...]", ""]
    for option in shown:
        short = f"-{option.short}, " if option.short else "    "
        name = f"--{option.long}" + (f"={option.metavar}" if option.metavar else "")
        lines.append(f"  {short}{name:<28} {option.help}")
    return "\n".join(lines) + "\n"
