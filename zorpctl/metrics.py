"""zorpctl metrics: the state of every process as Prometheus reads it.

    zorpctl metrics                                   # once, to standard output
    zorpctl metrics --listen 127.0.0.1:9363           # serve it, until a signal comes
    zorpctl metrics --listen unix:/run/zorp/metrics

Theory of operation
    Each scrape asks the control sockets: the branches `stats`, `service` and `info` of every
    process, never `conns`, so that its cost does not grow with the sessions.  A process that does
    not answer has zorp_up 0 and nothing else; it costs its timeout, not the scrape.

    This is a process of its own, started by whoever wants it, and not a thread of the daemon:
    a firewall needs no HTTP server inside, the exporter needs no more than the group zorp, one
    serves all instances, and it can crash alone.  It listens on loopback addresses or a unix
    socket (mode 0660) only, answers one client after the other, and gives each few seconds.

The text is made by prometheus-client, which `make install` brings along; a package without it
(pip's --no-deps) uses that of the system (python3-prometheus-client).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from zorpctl import queries
from zorpctl.processes import Process
from zorpctl.szig import SzigClient, SzigError, components

try:
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
except ImportError:
    prometheus_client = None

SCRAPE_TIMEOUT_S = 3.0
_CLIENT_TIMEOUT_S = 5.0

# (node of the statistics, metric, help)
_PROCESS_GAUGES = (
    ("stats.sessions_running", "zorp_sessions_running", "Sessions now"),
    ("stats.threads_running", "zorp_threads_running", "Threads now"),
    ("info.policy.reload_stamp", "zorp_policy_loaded_timestamp_seconds", "When the policy in force was loaded"),
    ("info.policy.generations", "zorp_policy_generations", "Policies that still have sessions"),
)
_PROCESS_COUNTERS = (
    ("stats.thread_number", "zorp_threads_started", "Threads started"),
    ("info.reload_failures", "zorp_reload_failures", "Reloads that failed"),
)
_SERVICE_GAUGES = (
    ("sessions_running", "zorp_service_sessions_running", "Sessions of the service now"),
    ("sessions_max", "zorp_service_sessions_max", "Most sessions of the service at a time"),
)
_SERVICE_COUNTERS = (("session_number", "zorp_service_sessions", "Sessions of the service started"),)


class MetricsError(Exception):
    """The metrics cannot be given; the text says why."""


class Collector:
    """What prometheus-client asks at each scrape."""

    def __init__(self, processes: Callable[[], list[Process]]) -> None:
        """processes: called at each scrape, because instances come and go."""
        self._processes = processes

    def collect(self) -> Iterator:
        """Yield every metric family."""
        self._families: dict[str, object] = {}
        for process in self._processes():
            self._add(GaugeMetricFamily, "zorp_up", "The process answers", {"process": process.name},
                      int(self._ask(process)))
        yield from self._families.values()

    def _ask(self, process: Process) -> bool:
        if not process.is_running():
            return False
        try:
            with SzigClient(process.socket_path, SCRAPE_TIMEOUT_S) as szig:
                nodes = dict(szig.dump("stats") + szig.dump("service") + szig.dump("info"))
        except SzigError:
            return False
        labels = {"process": process.name}
        for table, family in ((_PROCESS_GAUGES, GaugeMetricFamily), (_PROCESS_COUNTERS, CounterMetricFamily)):
            for node, name, meaning in table:
                self._add(family, name, meaning, labels, _number(nodes.get(node)))
        self._add_info(labels, nodes)
        self._add_services(process, nodes)
        self._add_process(nodes, labels)
        return True

    def _add_info(self, labels: dict[str, str], nodes: dict[str, str]) -> None:
        self._add(GaugeMetricFamily, "zorp_build_info", "Version of the program",
                  {**labels, "version": nodes.get("info.version", "")}, 1)
        current = queries.is_current(nodes.get("info.policy.file"), nodes.get("info.policy.file_stamp"))
        self._add(GaugeMetricFamily, "zorp_policy_current", "The policy file is the one in force", labels, int(current))

    def _add_services(self, process: Process, nodes: dict[str, str]) -> None:
        for name, value in nodes.items():
            parts = components(name)
            if len(parts) != 3 or parts[0] != "service":
                continue
            labels = {"process": process.name, "service": parts[1]}
            for table, family in ((_SERVICE_GAUGES, GaugeMetricFamily), (_SERVICE_COUNTERS, CounterMetricFamily)):
                for leaf, metric, meaning in table:
                    if leaf == parts[2]:
                        self._add(family, metric, meaning, labels, _number(value))

    def _add_process(self, nodes: dict[str, str], labels: dict[str, str]) -> None:
        usage = queries.resources(_pid(nodes.get("info.pid")))
        for mode in ("user", "system"):
            self._add(CounterMetricFamily, "zorp_cpu_seconds", "Processor time", {**labels, "mode": mode},
                      usage[f"cpu_{mode}_s"])
        self._add(GaugeMetricFamily, "zorp_resident_memory_bytes", "Resident memory", labels, usage["rss_kib"] * 1024)

    def _add(self, family, name: str, meaning: str, labels: dict[str, str], value: float | None) -> None:
        if value is None:
            return
        if name not in self._families:
            self._families[name] = family(name, meaning, labels=list(labels))
        self._families[name].add_metric(list(labels.values()), value)


def _pid(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _registry(processes: Callable[[], list[Process]]):
    if prometheus_client is None:
        raise MetricsError(f"prometheus-client is not installed for {sys.executable}: apt-get install "
                           "python3-prometheus-client, or make install with network")
    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    registry.register(Collector(processes))
    return registry


def text(processes: Callable[[], list[Process]]) -> str:
    """Return the metrics in Prometheus' text form.  Raises MetricsError."""
    registry = _registry(processes)
    return prometheus_client.generate_latest(registry).decode("utf-8")


# ---- serving

class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format, *arguments) -> None:
        """A scrape every few seconds is not worth a line."""

    def address_string(self) -> str:
        return "local"


class _TcpServer(WSGIServer):
    def server_bind(self) -> None:
        """Bind without looking our name up in DNS."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]
        self.setup_environ()


class _TcpServer6(_TcpServer):
    address_family = socket.AF_INET6


class _UnixServer(WSGIServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Bind to a path; a socket that nobody listens on any more is replaced."""
        _remove_stale(self.server_address)
        mask = os.umask(0o117)
        try:
            self.socket.bind(self.server_address)
        finally:
            os.umask(mask)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self):
        """Return the connection and an address in the form that the handler expects."""
        return self.socket.accept()[0], ("local", 0)


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            return                           # bind() will say that the address is in use
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) != 0:
            os.unlink(path)


def server(listen: str, processes: Callable[[], list[Process]]) -> WSGIServer:
    """Return a server that is bound: `unix:PATH`, or `ADDRESS:PORT` with a loopback address.  Raises MetricsError."""
    registry = _registry(processes)
    kind, _, path = listen.partition(":")
    try:
        if kind == "unix":
            made = _UnixServer(path, _Handler)
        else:
            host, port = _loopback(listen)
            made = (_TcpServer6 if ":" in host else _TcpServer)((host, port), _Handler)
    except OSError as problem:
        raise MetricsError(f"Cannot listen on {listen}: {problem.strerror}") from None
    made.set_app(prometheus_client.make_wsgi_app(registry))
    return made


def _loopback(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        if not port.isascii() or not 0 <= int(port) <= 65_535 or not ipaddress.ip_address(host).is_loopback:
            raise ValueError
    except ValueError:
        raise MetricsError(f"Cannot listen on {listen}: give unix:PATH, or a loopback address and a port such as "
                           "127.0.0.1:9363; what is said here is for this host only") from None
    return host, int(port)
