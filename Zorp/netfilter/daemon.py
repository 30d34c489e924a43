"""The program kzorpd: the one process that changes this host's packet rules while it runs.

Theory of operation
    One thread turns one loop: the control socket, signals, children that load policies, events
    of connections, denied packets, timers.  Everything that changes packet rules happens in it,
    one change after the other, so a request is answered with what has really happened.  A second
    thread looks up host names and wakes the loop.

    start     put in force what was in force last; read the policies of instances that never
              handed over; READY=1
    reload    (HUP, RELOAD) read all policies; take their zones, or keep everything (see
              Zorp.netfilter.daemon_rules); a request is answered when that has ended
    hand-over an instance starts or reloads: its description is in force before it serves, if the
              policy file that instances.conf names says the same; only listeners' ports, which
              the instance alone knows, are taken as handed over.  A process that a peer has taken
              over can therefore forward nothing that the policy does not
    stopped   an instance has ended, or wants no rules any more (remove): what may be believed of
              that, and from whom, is said in Zorp.netfilter.daemon_control
    TERM, INT end; rules and zones stay, with the addresses of host names: a rule that refuses them
              goes on doing so.  Where rules go with their instance (on_stop: flush), the addresses
              go as well, as in the original

    Whatever goes wrong is logged and changes nothing; only a host on which the control socket
    cannot be made, another kzorpd runs, or somebody else may write where our state or socket is,
    ends the process.

Exit status: 0; 1 when it cannot start, or when --reload was refused; 2 for a wrong command line.

Rights: CAP_NET_ADMIN.  Policies are loaded by children without any.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import selectors
import signal
import sys
from collections.abc import Callable

from Zorp import Log
from Zorp.Config import config
from Zorp.Exceptions import PolicyError
from Zorp.Log import log, log_exception
from Zorp.netfilter import site as sites
from Zorp.netfilter.caution import Unconfirmed, confirmed
from Zorp.netfilter.conntrack import (
    ConnectionEvents,
    ConntrackError,
    connections,
    count_bytes,
)
from Zorp.netfilter.daemon_control import ControlError, ControlServer, Refused
from Zorp.netfilter.daemon_names import TTL_FLOOR_S, HostNames
from Zorp.netfilter.daemon_policies import Policies, PolicyReader
from Zorp.netfilter.daemon_rules import PacketRules, RulesError
from Zorp.netfilter.nflog import LogGroup, LogGroupError
from Zorp.netfilter.own_files import only_kzorpd
from Zorp.netfilter.session_log import SessionLog
from Zorp.netfilter.site import Site, SiteError
from Zorp.process.logsinks import Formatter, StderrSink, SyslogSink
from Zorp.process.notify import BadWatchdogTime, Notifier
from Zorp.process.signals import SignalPipe
from Zorp.process.timers import Timer, Timers
from Zorp.ResolverCache import DNSResolver
from Zorp.rules.description import (
    MAX_ZONES,
    DescriptionError,
    InstanceDescription,
    ZoneData,
    from_json,
    parse_net,
    to_json,
)
from Zorp.transport.kzorpd import KzorpdError, exchange, socket_path

EXIT_OK = 0
EXIT_FAILED = 1
DEFAULT_VERBOSITY = 3
DEFAULT_LOG_SPEC = "core.accounting:4"
RELOAD_DEADLINE_S = 60.0
DRIFT_CHECK_S = 30
_NAMES_PAUSE_S = 0.2             # names that change together are one change of the sets
_NAMES_RETRY_S = 60.0
_TICK_S = 1.0
_LOG_FLUSH_S = 0.1
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        site = sites.read_file(options.config_dir)
        if options.reload:
            return _ask_for_reload(site)
        Log.set_filter(Log.Filter(options.verbose, options.log_spec))
    except (SiteError, Log.BadLogSpec) as problem:
        print(f"kzorpd: {problem}", file=sys.stderr)
        return EXIT_FAILED
    formatter = Formatter("classic", "kzorpd")
    sink = StderrSink(formatter) if options.no_syslog else SyslogSink(formatter)
    Log.configure(sink=sink)
    try:
        with only_kzorpd(site.state_dir):
            return Kzorpd(site, options, sink).run()
    except (ControlError, BadWatchdogTime, OSError) as problem:
        print(f"kzorpd: {problem}", file=sys.stderr)
        log(None, "core.error", 1, "Cannot start; error='%s'", (problem,))
        sink.flush()
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kzorpd", description="Keeps packet rules and zones of this host current.",
                                     allow_abbrev=False)
    parser.add_argument("-v", "--verbose", type=int, default=DEFAULT_VERBOSITY, metavar="N", help="verbosity (3)")
    parser.add_argument("-l", "--no-syslog", action="store_true", help="log to stderr")
    parser.add_argument("-s", "--log-spec", default=DEFAULT_LOG_SPEC, metavar="SPEC",
                        help="verbosity per category (%(default)s)")
    parser.add_argument("-r", "--reload", action="store_true", help="let the running kzorpd reload, wait for it")
    parser.add_argument("--config-dir", default=config.dirs.sysconfdir, metavar="DIR",
                        help="where instances.conf and kzorp.yml are (%(default)s)")
    parser.add_argument("--name-server", type=_name_server, metavar="ADDRESS",
                        help="ask this name server, not those of the host")
    parser.add_argument("--least-ttl", type=_seconds, default=TTL_FLOOR_S, metavar="SEC",
                        help="look a host name up again after this time at the earliest (%(default)s)")
    parser.add_argument("--drift-check", type=_seconds, default=DRIFT_CHECK_S, metavar="SEC",
                        help="compare the kernel with what it was given this often (%(default)s)")
    return parser


def _seconds(text: str) -> int:
    if (seconds := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 second was expected, not {text}")
    return seconds


def _name_server(text: str) -> str:
    try:
        DNSResolver(text)
    except PolicyError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return text


def _ask_for_reload(site: Site) -> int:
    try:
        answer = exchange(socket_path(site.pid_dir), b"RELOAD\n", RELOAD_DEADLINE_S)
    except KzorpdError as problem:
        answer = str(problem).encode()
    if answer == b"OK":
        return EXIT_OK
    print(f"kzorpd: {answer.decode('utf-8', 'replace').removeprefix('FAIL ')}", file=sys.stderr)
    return EXIT_FAILED


class Kzorpd:
    """See the module's text.  run() returns the exit status."""

    def __init__(self, site: Site, options: argparse.Namespace, sink) -> None:
        """Raises BadWatchdogTime."""
        self._site = site
        self._sink = sink
        self._notifier = Notifier()
        self._selector = selectors.DefaultSelector()
        self._timers = Timers()
        self._signals = SignalPipe(_SIGNALS)
        self._rules = PacketRules(site)
        self._policies = PolicyReader(options.config_dir, self._selector, self._timers)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._names = HostNames(lambda: os.eventfd_write(self._wake, 1), config.options.zone_dns_grace,
                                DNSResolver(options.name_server), options.least_ttl)
        self._names_timer: Timer | None = None           # until addresses of host names are taken
        self._drift_check_s = options.drift_check
        marks = site.marks
        self._sessions = SessionLog(site, self._rules, lambda: connections(marks.forward, marks.class_mask))
        self._watching: list = []
        self._stopping = False

    def run(self) -> int:
        """Live until told to end.  Raises ControlError."""
        log(None, "core.info", 1, "KZorpd starting up...")
        user = _user(self._site.user)
        control = ControlServer(self._site.pid_dir, self._selector, self._timers, self, user and user.pw_uid)
        if user is not None:
            control.give_to_group(user.pw_gid)
        self._register(self._signals, self._take_signals)
        self._register(self._wake, self._names_have_changed)
        self._start()
        while not self._stopping:
            for key, events in self._selector.select(self._sleep_s()):
                self._guarded(key.data, events)
            self._timers.run_due()
            if self._sink.waiting:
                self._sink.flush()
        self._end(control)
        return EXIT_OK

    def _register(self, descriptor, take: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, lambda events: take())

    def _sleep_s(self) -> float | None:
        sleep_s = self._timers.timeout()
        if self._sink.waiting:
            return _LOG_FLUSH_S if sleep_s is None else min(sleep_s, _LOG_FLUSH_S)
        return sleep_s

    @staticmethod
    def _guarded(take: Callable[..., None], *arguments) -> None:
        """A defect of ours costs one step, never the process."""
        try:
            take(*arguments)
        except Exception as problem:
            log(None, "core.error", 1, "Unexpected error; error='%s'", (problem,))
            log_exception(None)

    # ---- the way up and down

    def _start(self) -> None:
        if (error := _error_of(self._rules.restore)) is not None:
            log(None, "core.error", 1, "Unable to load configuration, keep existing one; error='%s'", (error,))
        self._names.remember(self._rules.addresses())
        self._watch_names()
        self._names.start()
        if self._rules.is_active:
            self._watch_kernel()
            self._timers.after(self._drift_check_s, self._check_drift)
        self._timers.after(_TICK_S, self._tick)
        self._feed_watchdog()
        self._policies.read(self._policies_at_start)

    def _policies_at_start(self, found: Policies) -> None:
        for problem in found.problems:
            log(None, "core.error", 1, "Unable to load configuration, keep existing one; error='%s'", (problem,))

        def take() -> None:
            self._rules.miss(found.unread)
            self._rules.take_policies(found.descriptions, found.known, is_start=True)

        if (error := _error_of(take)) is not None:
            log(None, "core.error", 1, "Unable to load configuration, keep existing one; error='%s'", (error,))
        if not self._rules.state.entries:
            log(None, "core.info", 1, "Failed to set up zone handler, no static zones loaded")
        _error_of(self._watch_names)
        self._notifier.send("READY=1")
        log(None, "core.debug", 6, "Policies have been read; instances='%d'", (len(self._rules.state.entries),))

    def _watch_kernel(self) -> None:
        """Let the kernel tell about forwarded and denied connections; without that, there are no lines about them."""
        marks = self._site.marks
        try:
            count_bytes()
        except OSError as problem:
            log(None, "core.error", 1, "Connections do not count bytes, set net.netfilter.nf_conntrack_acct=1; "
                "error='%s'", (problem.strerror,))
        try:
            events = ConnectionEvents(marks.forward, marks.class_mask)
            self._watching.append(events)
            self._register(events, lambda: self._take_events(events))
            self._sessions.adopt()
        except ConntrackError as problem:
            log(None, "core.error", 1, "Forwarded sessions are not logged; error='%s'", (problem,))
        try:
            group = LogGroup(self._site.nflog_group)
            self._watching.append(group)
            self._register(group, lambda: self._take_packets(group))
        except LogGroupError as problem:
            log(None, "core.error", 1, "Denied sessions are not logged; error='%s'", (problem,))

    def _end(self, control: ControlServer) -> None:
        self._names.stop()
        self._policies.close()
        if self._site.on_stop == "flush":
            try:
                self._rules.take_addresses({name: [] for name in self._rules.hostnames()})
            except RulesError as problem:
                log(None, "core.error", 1, "Unable to update addresses in zones, keep existing ones; error='%s'",
                    (problem,))
        log(None, "core.info", 1, "KZorpd shutting down...")
        control.close()
        for watched in self._watching:
            watched.close()
        self._sink.flush()

    # ---- events

    def _take_signals(self) -> None:
        for number in self._signals.arrived():
            if number == signal.SIGHUP:
                log(None, "core.info", 1, "Received SIGHUP, reloading configuration")
                self.reload(lambda error, fields: None)
            else:
                log(None, "core.info", 1, "Received %s, loading static zones", (number.name,))
                self._notifier.send("STOPPING=1")
                self._stopping = True

    def _take_events(self, events: ConnectionEvents) -> None:
        for event in events.read():
            self._guarded(self._sessions.take, event)
        if events.take_loss():
            self._sessions.resynchronise()

    def _take_packets(self, group: LogGroup) -> None:
        for packet in group.read():
            self._guarded(self._sessions.deny, packet)
        if group.take_loss():
            log(None, "core.error", 1, "Denied packets came faster than they could be read, some have no line;")

    def _tick(self) -> None:
        self._timers.after(_TICK_S, self._tick)
        self._sessions.tick()

    def _check_drift(self) -> None:
        self._timers.after(self._drift_check_s, self._check_drift)
        try:
            self._rules.retry()
        except RulesError as problem:
            log(None, "core.error", 3, "Packet rules are still not in force; error='%s'", (problem,))
        self._rules.look_for_drift()

    def _feed_watchdog(self) -> None:
        if self._notifier.watchdog_s is not None:
            self._timers.after(self._notifier.watchdog_s, self._feed_watchdog)
            self._notifier.send("WATCHDOG=1")

    # ---- host names

    def _watch_names(self) -> None:
        self._names.watch(self._rules.hostnames())

    def _names_have_changed(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._update_names_after(_NAMES_PAUSE_S)

    def _update_names_after(self, pause_s: float) -> None:
        if self._names_timer is not None:
            if self._names_timer.due_s <= self._timers.now() + pause_s:
                return
            self._names_timer.cancel()                   # a change does not wait until a failed one is tried again
        self._names_timer = self._timers.after(pause_s, self._update_names)

    def _update_names(self) -> None:
        def take() -> None:
            self._rules.take_addresses(self._names.addresses())

        self._names_timer = None
        if (error := _error_of(take)) is not None:
            log(None, "core.error", 1, "Unable to update addresses in zones, keep existing ones; error='%s'", (error,))
            self._update_names_after(_NAMES_RETRY_S)

    # ---- requests (daemon_control.Actions)

    def reload(self, answer: Callable[[str | None, dict], None]) -> None:
        """Read all policies again; answer when that has ended."""
        self._notifier.send("RELOADING=1")

        def take_policies(found: Policies) -> None:
            self._rules.miss(found.unread)
            if found.problems:
                raise RulesError("; ".join(found.problems))
            self._rules.take_policies(found.descriptions, found.known, is_start=False)

        def take(found: Policies) -> None:
            error = _error_of(lambda: take_policies(found))
            if error is not None:
                log(None, "core.error", 1, "Unable to load configuration, keep existing one; error='%s'", (error,))
            else:                                        # who asks for rules to be in force must not hear OK otherwise
                error = _error_of(self._rules.look_for_drift)
            error = _error_of(self._watch_names) or error
            self._notifier.send("READY=1")
            answer(error, {})

        self._policies.read(take)

    def perform(self, request: dict, *, is_trusted: bool) -> dict:
        """Carry out a request of the control socket.  Raises Refused."""
        with _refusing(request["request"]):
            if request["request"] == "stopped":
                self._rules.instance_stopped(_text(request, "instance"), is_trusted=is_trusted)
                self._watch_names()
                return {}
            return getattr(self, f"_do_{request['request']}")(request)

    def confirm(self, request: dict, answer: Callable[[str | None, dict], None], *, is_trusted: bool) -> None:
        """Put in force what an instance wants, or take its rules away; answer when that is done.  Raises Refused."""
        what = request["request"]
        with _refusing(what):
            handed = from_json(_text(request, "description")) if what == "instance" else None
            name = handed.instance if handed is not None else _text(request, "instance")
            if is_trusted or (handed is None and self._rules.state.entry(name) is None):
                self._take_wish(name, handed)
                answer(None, {"mode": self._site.mode})
                return

        def take_wish(found: Policies) -> None:
            with _refusing(what):
                self._take_wish(name, _confirmed(name, handed, found))

        def take(found: Policies) -> None:
            error = _error_of(lambda: take_wish(found))
            answer(error, {"mode": self._site.mode} if error is None else {})

        self._policies.read(take, only=name)

    def _take_wish(self, name: str, description: InstanceDescription | None) -> None:
        """Put in force what an instance wants; None: nothing any more."""
        if description is not None:
            self._put_in_force(description)
            return
        self._rules.remove(name)
        self._watch_names()

    def _put_in_force(self, description: InstanceDescription) -> None:
        self._rules.hand_over(description)
        self._watch_names()
        log(None, "core.info", 3, "Packet rules of an instance are in force; instance='%s', rules='%d', services='%d', "
            "zones='%d'", (description.instance, len(description.rules), len(description.services),
                           len(description.zones)))

    def _do_hello(self, request: dict) -> dict:
        return {"mode": self._site.mode}

    def _do_dump(self, request: dict) -> dict:
        return {"instances": [to_json(description) for description in self._rules.state.descriptions],
                "counters": [[*key, count] for key, count in self._sessions.counters.items()],
                "addresses": self._rules.addresses()}

    def _do_zones(self, request: dict) -> dict:
        self._rules.replace_zones(_zones(request.get("zones")))
        self._watch_names()
        return {}

    def _do_flush(self, request: dict) -> dict:
        if _text(request, "what") != "zones":
            raise Refused("only zones can be emptied")
        self._rules.empty_zones()
        self._watch_names()
        return {}


@contextlib.contextmanager
def _refusing(request: str):
    """Log why a request cannot be carried out, and refuse it."""
    try:
        yield
    except (RulesError, DescriptionError, Unconfirmed) as problem:
        log(None, "core.error", 1, "Request refused; request='%s', error='%s'", (request, problem))
        raise Refused(str(problem)) from None


def _error_of(step: Callable[[], str | None]) -> str | None:
    """Carry out a step of something that somebody waits for; return what went wrong, which a defect is, too."""
    try:
        return step()
    except (RulesError, Refused) as problem:
        return str(problem)
    except Exception as problem:
        log(None, "core.error", 1, "Unexpected error; error='%s'", (problem,))
        log_exception(None)
        return f"unexpected error, the log says more: {type(problem).__name__}"


def _confirmed(name: str, handed: InstanceDescription | None, found: Policies) -> InstanceDescription | None:
    """Return what an instance may have of what it hands over; None: it wants nothing.  Raises Unconfirmed."""
    if name in found.descriptions:
        return confirmed(name, handed, found.descriptions[name])
    if found.known is None or name in found.known:
        raise Unconfirmed(f"instance '{name}': its policy file cannot be read: {'; '.join(found.problems)}")
    raise Unconfirmed(f"instance '{name}' is not in instances.conf; add it there with the options that it is started "
                      "with, or start it with --packet-rules administrator (kzorp-setup load) or none")


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _text(request: dict, field: str) -> str:
    value = request.get(field)
    if not isinstance(value, str):
        raise Refused(f"{field}: a text was expected")
    return value


def _zones(value: object) -> tuple[ZoneData, ...]:
    """Return the zones of a request; what is in them is checked with the descriptions they go into."""
    if not isinstance(value, list) or len(value) > MAX_ZONES:
        raise Refused(f"zones: a list of at most {MAX_ZONES} was expected")
    try:
        return tuple(ZoneData(name=zone["name"], parent=zone["parent"], nets=tuple(map(parse_net, zone["nets"])))
                     for zone in value)
    except (TypeError, KeyError, ValueError) as problem:
        raise Refused(f"zones: {problem}") from None
