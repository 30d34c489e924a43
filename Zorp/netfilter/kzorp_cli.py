"""The program kzorp: show the packet level's zones, services, rules and listeners; ask what a connection gets.

    kzorp -z | -s | -d | -b            zones, services, dispatchers (rules), binds
    kzorp -e PROTO CLIENT SERVER IFACE [--src-port N] --dst-port N | --icmp-type N --icmp-code N
    kzorp -l IP                        the zone of an address
    kzorp -u FILE, -f WHAT             replace all zones, empty something; kzorpd does it
    kzorp --json ...                   one JSON document instead of lines

Theory of operation
    What is shown is what kzorpd has in force; when no kzorpd answers, which is said, what the
    policies of instances.conf say now, each loaded by a child without rights, with the addresses
    of host names that kzorpd knew last.  The evaluation is that of the
    daemons, made here, with the interfaces of this host.

Exit status: that of the last action.  0; 1 when a dump, an upload or a flush fails; 2 for a
    wrong command line, for ordinary users, and when there is neither kzorpd nor an instance.
    An evaluation that cannot be made prints why and exits with 0, as ever.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator

from Zorp.Config import config
from Zorp.netfilter import kzorp_text as text
from Zorp.netfilter import policies, site
from Zorp.netfilter.evaluator import Evaluator, Verdict
from Zorp.netfilter.instance_zones import Zoned, described, zoned
from Zorp.netfilter.known_addresses import KnownAddresses
from Zorp.netfilter.policies import PolicyUnusable
from Zorp.netfilter.upload import UploadError, read_zones
from Zorp.rules.description import DescriptionError, InstanceDescription, from_json
from Zorp.rules.engine import Traffic
from Zorp.transport.interfaces import interfaces
from Zorp.transport.kzorpd import KzorpdAway, KzorpdError, ask, socket_path

VERSION = "4.6"                  # of the protocol between the original and its kernel module
EXIT_FAILED = 1
EXIT_USAGE = 2
ANSWER_DEADLINE_S = 60.0
_ABSENT = "KZorp support not present in kernel"
_AWAY = ("kzorp: kzorpd does not answer; this is what the policies say now, with the addresses of host names that "
         "it knew last")
_NOT_FLUSHED = "kzorp: only zones can be emptied; services, rules and binds are those of the policies, and stay"
_FLUSHABLE = ("binds", "dispatchers", "services", "zones", "all")
_EVALUATE_ARGUMENTS = ("-e option requires 4 arguments: <protocol> <client address> <server address> "
                       "<interface name>")
_PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "ipv6-icmp": 58}
_MOST_DIGITS = 20                # Python reads thousands of them not, or slowly
_WITH_PORTS, _WITH_TYPE = (6, 17), (1, 58)


class _Usage(Exception):
    """The command line is wrong; `str()` is the message."""


class _Failed(Exception):
    """An action failed: text for stderr, and the exit status."""

    def __init__(self, message: str, status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.status = status


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    if os.geteuid() != 0:
        print("kzorp must be run as root", file=sys.stderr)
        return EXIT_USAGE
    sys.stdout.reconfigure(errors="backslashreplace")        # names of zones may have what a terminal has not
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _Command(options).run()
    except _Usage as problem:
        parser.print_usage(sys.stderr)
        print(f"kzorp: error: {problem}", file=sys.stderr)
        return EXIT_USAGE
    except _Failed as problem:
        print(problem, file=sys.stderr)
        return problem.status
    except BrokenPipeError:                          # `kzorp -z | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kzorp", description="Show what the packet level does.", allow_abbrev=False)
    flags = (("-v", "version", "print the version"), ("-z", "zones", "show zones"),
             ("-s", "services", "show services"), ("-d", "dispatchers", "show dispatchers and their rules"),
             ("-b", "binds", "show where rules are served"), ("-q", "quiet", "no output"))
    for short, name, what in flags:
        parser.add_argument(short, f"--{name}", action="store_true", help=what)
    parser.add_argument("-e", "--evaluate", nargs="*", metavar="X", help="PROTO CLIENT SERVER IFACE: what it gets")
    parser.add_argument("-l", "--lookup", metavar="IP", help="show the zone of an address")
    parser.add_argument("-u", "--upload", metavar="FILE", help="replace all zones by those of a file")
    parser.add_argument("-f", "--flush", choices=_FLUSHABLE, help="empty")
    for name, high, default in (("src-port", 65_535, 1024), ("dst-port", 65_535, None), ("icmp-type", 255, None),
                                ("icmp-code", 255, None), ("request-id", 0xFFFFFFFF, None)):
        parser.add_argument(f"--{name}", type=_number_up_to(high), default=default, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--config-dir", default=config.dirs.sysconfdir, metavar="DIR",
                        help="where instances.conf is (%(default)s)")
    parser.add_argument("--pid-dir", metavar="DIR", help="where kzorpd's socket is (as kzorp.yml says)")
    return parser


def _number_up_to(high: int) -> Callable[[str], int]:
    def number(given: str) -> int:
        value = int(given)
        if not 0 <= value <= high:
            raise argparse.ArgumentTypeError(f"a number from 0 to {high} was expected, not {given}")
        return value
    return number


@dataclasses.dataclass(frozen=True)
class _Question:
    """A connection to evaluate."""

    client: str
    server: str
    traffic: Traffic

    def line(self) -> str:
        """Return the first line of the answer."""
        traffic = self.traffic
        ports = traffic.proto in _WITH_PORTS
        client, server = ((f"{self.client}:{traffic.src_port}", f"{self.server}:{traffic.dst_port}") if ports
                          else (self.client, self.server))
        parts = [f"evaluating {client} -> {server} on {traffic.iface}"]
        if traffic.proto_type >= 0:
            parts.append(f"the protocol type is {traffic.proto_type}")
        if traffic.proto_subtype >= 0:
            parts.append(f"the protocol subtype is {traffic.proto_subtype}")
        parts += [f"the request id is {reqid}" for reqid in traffic.reqids]
        return " and ".join(parts)


class _Command:
    """One invocation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        try:
            settings = site.read_file(options.config_dir)
        except site.SiteError as problem:
            raise _Failed(str(problem)) from None
        self._socket = socket_path(options.pid_dir or settings.pid_dir)
        self._known = KnownAddresses(settings.state_dir)
        self._state: text.HostState | None = None
        self._document: dict = {}
        self._zones: list[Zoned] | None = None

    def run(self) -> int:
        options = self._options
        actions = [name for name in ("version", "flush", "zones", "services", "dispatchers", "binds", "upload",
                                     "evaluate", "lookup") if getattr(options, name) not in (None, False)]
        if not actions:
            raise _Usage("no action was given")
        self._question = self._read_question() if options.evaluate is not None else None
        self._address = self._read_address(options.lookup) if options.lookup is not None else None
        status, complaint = 0, ""
        for action in actions:
            try:
                status = getattr(self, f"_do_{action}")() or 0
            except _Failed as problem:
                if problem.status == EXIT_USAGE:
                    raise
                status, complaint = problem.status, str(problem)
                print(complaint, file=sys.stderr)
        if options.json:
            print(json.dumps(self._document, indent=2))
        sys.stdout.flush()
        return status

    # ---- input

    def _read_question(self) -> _Question:
        options = self._options
        if len(options.evaluate) != 4:
            raise _Usage(_EVALUATE_ARGUMENTS)
        proto_text, client, server, iface = options.evaluate
        proto = _protocol(proto_text)
        family, source = _address(client, "invalid client ip: %s")
        other_family, destination = _address(server, "invalid server ip: %s")
        if family != other_family:
            raise _Usage("family of source and destination address is not the same")
        if len(iface) > 15:
            raise _Usage("invalid interface name (>15 characters)")
        if proto in _WITH_PORTS and options.dst_port is None:
            raise _Usage("--dst-port is needed with TCP and UDP")
        if proto in _WITH_TYPE and None in (options.icmp_type, options.icmp_code):
            raise _Usage("--icmp-type and --icmp-code are needed with ICMP")
        ports = (options.src_port, options.dst_port) if proto in _WITH_PORTS else (0, 0)
        kind = (options.icmp_type, options.icmp_code) if proto in _WITH_TYPE else (-1, -1)
        reqids = () if options.request_id is None else (options.request_id,)
        return _Question(client, server, Traffic(
            family=family, src=source, dst=destination, proto=proto, src_port=ports[0], dst_port=ports[1],
            proto_type=kind[0], proto_subtype=kind[1], iface=iface, reqids=reqids))

    @staticmethod
    def _read_address(given: str) -> tuple[int, int]:
        return _address(given, "invalid ip: %s")

    # ---- where the state comes from

    def _host_state(self) -> text.HostState:
        if self._state is None:
            try:
                self._state = state_of(ask(self._socket, "dump", ANSWER_DEADLINE_S))
            except KzorpdAway:
                self._state = text.HostState(instances=self._from_policies(), addresses=self._known.read())
                print(_AWAY, file=sys.stderr)
            except (KzorpdError, DescriptionError) as problem:
                raise _Failed(f"Dump failed: result='1' error='{problem}'") from None
        return self._state

    def _from_policies(self) -> tuple[InstanceDescription, ...]:
        try:
            lines = policies.read_instances(self._options.config_dir).lines
        except OSError:
            lines = ()
        if not lines:
            raise _Failed(f"{_ABSENT}: kzorpd does not answer, and {self._options.config_dir}/instances.conf names no "
                          "instance", EXIT_USAGE)
        found = policies.describe(lines)
        for problem in found.values():
            if isinstance(problem, PolicyUnusable):
                raise _Failed(f"Dump failed: result='1' error='{problem}'")
        return tuple(found.values())

    def _with_zones(self) -> list[Zoned]:
        if self._zones is None:
            state = self._host_state()
            self._zones = zoned(state.instances, state.addresses)
        return self._zones

    # ---- actions

    def _print(self, lines: Iterable[str], *, even_if_quiet: bool = False) -> None:
        if not self._options.json and (even_if_quiet or not self._options.quiet):
            for line in lines:
                print(line)

    def _show(self, key: str, values: list[dict], lines: Callable[[list[dict]], Iterator[str]]) -> None:
        self._document[key] = values
        self._print(lines(values))

    def _do_version(self) -> None:
        self._document["version"] = VERSION
        self._print([f"Version: {VERSION}"])

    def _do_zones(self) -> None:
        state = self._host_state()
        values = [text.zone_value(zone, state) for description in described(self._with_zones())
                  for zone in description.zones]
        distinct = {json.dumps(value): value for value in values}
        self._show("zones", list(distinct.values()), text.zone_lines)

    def _do_services(self) -> None:
        state = self._host_state()
        self._show("services", [text.service_value(instance.instance, service, state) for instance in state.instances
                                for service in instance.services], text.service_lines)

    def _do_dispatchers(self) -> None:
        state = self._host_state()
        self._show("dispatchers", [
            {"name": instance.instance, "rules": [text.rule_value(instance.instance, rule, state)
                                                  for rule in instance.rules]}
            for instance in state.instances if instance.rules], text.dispatcher_lines)

    def _do_binds(self) -> None:
        self._show("binds", [value for instance in self._host_state().instances
                             for value in text.bind_values(instance)], text.bind_lines)

    def _do_evaluate(self) -> int:
        question = self._question
        self._print([question.line()])
        try:
            socket.if_nametoindex(question.traffic.iface)
        except OSError:
            error = os.strerror(errno.ENODEV)
            self._document["evaluate"] = {"error": error}
            self._print([f"Evaluate failed: result='{-errno.ENODEV}', error='{error}'"], even_if_quiet=True)
            return EXIT_FAILED
        verdict = Evaluator(self._with_zones()).evaluate(_on_this_host(question.traffic))
        self._document["evaluate"] = dataclasses.asdict(verdict)
        self._print(_verdict_lines(verdict), even_if_quiet=True)
        return 0

    def _do_lookup(self) -> None:
        family, address = self._address
        evaluator = Evaluator(self._with_zones())
        name, claimants = evaluator.zone_of(family, address), evaluator.claimants(family, address)
        state = self._host_state()
        value = next((text.zone_value(zone, state) for zone in state.zones() if zone.name == name), None)
        self._document["lookup"] = value
        if value is not None:
            self._print([text.zone_line(value)])
        if claimants:
            self._document["disputed"] = list(claimants)
            self._print([f"Disputed: host names of several zones have this address; zones='{','.join(claimants)}'"])

    def _do_upload(self) -> None:
        try:
            with open(self._options.upload, encoding="utf-8", errors="surrogateescape") as file:
                zones = read_zones(file)
        except OSError as problem:
            raise _Failed(f"Cannot read {self._options.upload}: {problem.strerror}") from None
        except UploadError as problem:
            raise _Failed(str(problem)) from None
        self._order("zones", zones=[{"name": zone.name, "parent": zone.parent, "nets": list(map(str, zone.nets))}
                                    for zone in zones])
        self._document["uploaded"] = [zone.name for zone in zones]
        self._print(zone.name for zone in zones)

    def _do_flush(self) -> None:
        if self._options.flush in ("zones", "all"):
            self._order("flush", what="zones")
        elif not self._host_state().instances:           # the others never had a visible effect
            raise _Failed(f"{_ABSENT}: there is no instance", EXIT_USAGE)
        if self._options.flush != "zones":
            print(_NOT_FLUSHED, file=sys.stderr)
        self._document["flushed"] = self._options.flush

    def _order(self, request: str, **fields) -> None:
        try:
            ask(self._socket, request, ANSWER_DEADLINE_S, **fields)
        except KzorpdAway:
            raise _Failed(f"{_ABSENT}: kzorpd does not answer", EXIT_USAGE) from None
        except KzorpdError as problem:
            raise _Failed(f"kzorpd refused: {problem}") from None
        self._state = self._zones = None


def state_of(dump: dict) -> text.HostState:
    """Return what kzorpd's answer to `dump` says; raises DescriptionError when it makes no sense."""
    try:
        return text.HostState(
            instances=tuple(from_json(value) for value in dump["instances"]),
            counters={(kind, instance, name): int(count) for kind, instance, name, count in dump["counters"]},
            addresses={str(name): list(map(str, addresses)) for name, addresses in dump["addresses"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
        raise DescriptionError(f"the answer of kzorpd makes no sense: {problem}") from None


def _verdict_lines(verdict: Verdict) -> Iterator[str]:
    for name, value in (("Client zone", verdict.client_zone), ("Server zone", verdict.server_zone),
                        ("Service", verdict.service), ("Dispatcher", verdict.instance), ("Rule", verdict.rule_id)):
        yield f"{name}: {'not found' if value is None else value}"
    if verdict.disputed:
        yield "Disputed: host names of several zones have an address, and the zones do not permit the same"


def _on_this_host(traffic: Traffic) -> Traffic:
    """Add what rules may ask about the incoming interface."""
    return traffic._replace(
        ifgroup=interfaces.group(traffic.iface),
        dst_on_iface=(traffic.family, traffic.dst) in interfaces.addresses(traffic.iface))


def _protocol(given: str) -> int:
    if given.isascii() and given.isdigit():
        number = int(given) if len(given) <= _MOST_DIGITS else -1
    else:
        try:
            number = _PROTOCOLS.get(given.lower()) or socket.getprotobyname(given.lower())
        except (OSError, ValueError):
            number = -1
    if not 0 <= number <= 255:
        raise _Usage("protocol must be protocol name or number")
    return number


def _address(given: str, complaint: str) -> tuple[int, int]:
    try:
        return text.parse_address(given)
    except ValueError:
        raise _Usage(complaint % given) from None
