"""start, stop, restart, reload: what changes the life of an instance.

Theory of operation
    An instance is one master with one or more workers; it starts and ends as a whole.  Every
    command first does its part for all instances (launches the programs, sends the signals),
    then waits for each, so that ten instances take as long as the slowest.

    start    launches `zorp`, which returns when the first policy serves; its exit status is the
             answer.  A line with --foreground never returns: there the lock decides.
    stop     TERM to the master, or KILL; the master's lock is free when everything has ended.
    restart  looks at the policies first: an instance that serves is not stopped for one that cannot
             be used.
    reload   through the control socket; the daemon answers when the new policy serves, or why
             the old one stays.

    exec     becomes the program: for a service manager that keeps it in the foreground.

    Where systemd runs the instances (unit zorp@.service), start and stop are its business,
    unless it is systemd that calls us.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from Zorp.transport.kzorpd import KzorpdAway, KzorpdError, ask
from Zorp.wire.instances_conf import InstanceLine
from Zorp.wire.kzorpd import KZORPD_DIR
from zorpctl import queries
from zorpctl.host import Host
from zorpctl.processes import Process, lock_holder
from zorpctl.report import Result, failed
from zorpctl.szig import SzigClient, SzigError

RELOAD_TIMEOUT_S = 320.0              # a policy may take long to load; the daemon gives up earlier
_CHECK_TIMEOUT_S = RELOAD_TIMEOUT_S
_KZORPD_TIMEOUT_S = 30.0
_NOT_RUNNING = "Process not running"
_UNIT_DIRECTORIES = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


@dataclass
class _Launch:
    """An instance that is being started."""

    instance: InstanceLine
    processes: list[Process]
    program: subprocess.Popen
    returns: bool                     # False: --foreground, the program stays


class Lifecycle:
    """The commands; every method yields results in the order of the instances."""

    def __init__(self, host: Host) -> None:
        self._host = host

    # ---- start

    def start(self, groups: dict[str, list[Process]], *, forced: bool = False) -> Iterator[Result]:
        """Start instances that do not run."""
        launches = []
        for name, processes in groups.items():
            instance = self._host.instances.get(name)
            if instance is None:
                yield from (failed(process.name, "Not found in instances.conf") for process in processes)
            elif any(process.is_running() for process in processes):
                yield from (Result(process.name, "Process is already running") for process in processes)
            elif not instance.auto_start and not forced:
                yield from (Result(process.name, "Not started, because no-auto-start is set") for process in processes)
            elif _managed_by_systemd():
                yield from self._through_systemd("start", name, processes)
                yield from _rules_warning(processes)
            else:
                configured = self._host.configured(name)
                launches.append(self._launch(instance, configured))
        for launch in launches:
            yield from self._await_start(launch)

    def command(self, instance: InstanceLine) -> list[str]:
        """Return the command line that starts an instance."""
        words = [self._host.zorp, *instance.zorp_words]
        if self._host.pid_dir != "/var/run/zorp" and "--pid-dir" not in words:
            words += ["--pid-dir", self._host.pid_dir]
        if self._host.conf.kzorpd_dir != KZORPD_DIR and "--kzorpd-dir" not in words:
            words += ["--kzorpd-dir", self._host.conf.kzorpd_dir]
        words += ["--num-of-processes", str(instance.number_of_processes)]
        if instance.enable_core:
            words.append("--enable-core")
        if not instance.auto_restart:
            words += ["--process-mode", "background"]
        return words

    def foreground_command(self, instance: InstanceLine) -> list[str]:
        """Return the command line that ends by itself: for --check-policy and --explain."""
        return [word for word in self.command(instance) if word not in ("--foreground", "-F")]

    def _launch(self, instance: InstanceLine, processes: list[Process]) -> _Launch | Result:
        command = self.command(instance)
        try:
            program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError as problem:
            return failed(processes[0].name, f"Failed to start ({command[0]}: {problem.strerror})")
        returns = not {"--foreground", "-F"} & set(command)
        return _Launch(instance, processes, program, returns)

    def _await_start(self, launch: _Launch | Result) -> Iterator[Result]:
        if isinstance(launch, Result):
            yield launch
            return
        status = self._start_status(launch)
        for process in launch.processes:
            if status == "running":
                yield Result(process.name, "Running")
            else:
                yield failed(process.name, status)
        if status == "running":
            yield from _rules_warning(launch.processes)

    def _start_status(self, launch: _Launch) -> str:
        limit_s = self._host.conf.start_wait_timeout
        if not limit_s:
            return "running"
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            status = launch.program.poll()
            if status:
                return f"Failed to start (rc='{status}')"
            if all(process.is_running() for process in launch.processes) and (
                    status == 0 or (not launch.returns and all(process.worker_pid() for process in launch.processes))):
                return "running"
            time.sleep(min(self._host.conf.stop_check_delay, 0.1))
        return "Did not start in time"

    def replace_us(self, name: str) -> Iterator[Result]:
        """Become the program of this instance, in the foreground; return only with a failure.

        The service manager that called us starts it again; --no-auto-restart cannot mean that.
        """
        instance = self._host.instances.get(name)
        if instance is None:
            yield failed(name, "Not found in instances.conf")
            return
        if not instance.auto_restart:
            print(f"{name}: --no-auto-restart has no effect in the foreground, crashed processes are replaced",
                  file=sys.stderr, flush=True)
        command = [*self.command(instance), "--process-mode", "foreground"]
        try:
            os.execv(command[0], command)
        except OSError as problem:
            yield failed(name, f"Failed to start ({command[0]}: {problem.strerror})")

    # ---- stop

    def stop(self, groups: dict[str, list[Process]], *, forced: bool = False,
             is_for_good: bool = True) -> Iterator[Result]:
        """End instances; `forced` kills and cleans up; is_for_good: kzorpd may take their packet rules away."""
        number = signal.SIGKILL if forced else signal.SIGTERM
        running: dict[str, tuple[list[Process], int]] = {}
        for name, processes in groups.items():
            master = next(filter(None, (process.master_pid() for process in processes)), None)
            if master is None:
                yield from (Result(process.name, _NOT_RUNNING) for process in processes)
            elif not forced and _managed_by_systemd() and _is_active(name):
                yield from self._through_systemd("stop", name, processes)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(master, number)
                running[name] = processes, master
        deadline = time.monotonic() + self._host.conf.stop_check_timeout
        for processes, master in running.values():
            yield from self._await_end(processes, master, number, deadline)
        if is_for_good and os.geteuid() == 0:
            for name, processes in groups.items():
                if not any(process.is_running() for process in processes):
                    yield from _tell_kzorpd(name, processes[0])

    def _await_end(self, processes: list[Process], master: int, number: int, deadline: float) -> Iterator[Result]:
        while any(lock_holder(process.pid_path + ".lock") == master for process in processes):
            if time.monotonic() > deadline:
                text = (f"Did not exit in time (pid='{master}', signo='{int(number)}', "
                        f"timeout='{self._host.conf.stop_check_timeout:g}')")
                yield from (failed(process.name, text) for process in processes)
                return
            time.sleep(min(self._host.conf.stop_check_delay, 0.1))
        for process in processes:
            if number == signal.SIGKILL:
                process.remove_files()
            yield Result(process.name, "Stopped")

    # ---- restart, reload

    def restart(self, groups: dict[str, list[Process]], *, forced: bool = False,
                unchecked: bool = False) -> Iterator[Result]:
        """Stop and start; instances that have left instances.conf are only stopped.

        One that runs is left alone when its policy cannot be used, unless `unchecked` or `forced`.
        """
        if not (forced or unchecked):
            refused = dict(self._unusable(groups))
            for name, status in refused.items():
                text = (f"Not restarted, the policy is not usable (rc='{status}'); the instance goes on as it is, "
                        "mend the policy or give --force")
                yield from (failed(process.name, text) for process in groups[name])
            groups = {name: group for name, group in groups.items() if name not in refused}
        yield from self.stop(groups, forced=forced, is_for_good=False)
        yield from self.start({name: group for name, group in groups.items() if name in self._host.instances},
                              forced=forced)

    def _unusable(self, groups: dict[str, list[Process]]) -> Iterator[tuple[str, int]]:
        """Yield the instances that run and could not be started again, with the exit status of the check.

        What is wrong with them goes to standard error.
        """
        checks = {}
        for name, processes in groups.items():
            if name in self._host.instances and any(process.is_running() for process in processes):
                command = [*self.foreground_command(self._host.instances[name]), "--check-policy"]
                checks[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _CHECK_TIMEOUT_S
        for name, program in checks.items():
            try:
                status = program.wait(deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                program.kill()
                status = program.wait()
            if status:
                yield name, status

    def reload(self, groups: dict[str, list[Process]], *, revoke: bool = False) -> Iterator[Result]:
        """Load the policy again in every instance; failures say why.

        revoke: end the sessions of older policies that the new one refuses.
        """
        for processes in groups.values():
            if revoke:
                yield from self._reload_and_revoke(processes)
                continue
            problem = self._reload_instance(processes)
            for process in processes:
                yield Result(process.name, "Reload successful") if problem is None else failed(process.name, problem)

    @staticmethod
    def _reload_and_revoke(processes: list[Process]) -> Iterator[Result]:
        """Reload one instance and revoke; its first process says how many sessions of all have ended."""
        if not any(process.is_running() for process in processes):
            word, text = "FAIL", _NOT_RUNNING
        else:
            try:
                with SzigClient(processes[0].socket_path, RELOAD_TIMEOUT_S) as szig:
                    word, _, text = szig.ask("RELOAD REVOKE").partition(" ")
            except SzigError as problem:
                word, text = "FAIL", str(problem)
        if word != "OK":
            yield from (failed(process.name, text) for process in processes)
            return
        yield Result(processes[0].name, text)
        yield from (Result(process.name, text.partition(";")[0]) for process in processes[1:])

    def _reload_instance(self, processes: list[Process]) -> str | None:
        """Reload one instance (all its processes at once); return what went wrong."""
        if not any(process.is_running() for process in processes):
            return _NOT_RUNNING
        try:
            with SzigClient(processes[0].socket_path, RELOAD_TIMEOUT_S) as szig:
                answer = szig.ask("RELOAD WAIT")
                if answer == "FAIL Unknown RELOAD subcommand":         # an older daemon
                    szig.order("RELOAD")
                    answer = szig.ask("RELOAD RESULT")
        except SzigError as problem:
            return str(problem)
        return None if answer.startswith("OK") else answer.partition(" ")[2]

    def reload_or_restart(self, groups: dict[str, list[Process]]) -> Iterator[Result]:
        """Reload; restart the instances whose reload failed, which ends their sessions: say why."""
        for name, processes in groups.items():
            problem = self._reload_instance(processes)
            if problem is None:
                yield from (Result(process.name, "Reload successful") for process in processes)
                continue
            if problem != _NOT_RUNNING:
                yield Result(processes[0].name, f"warning: restarting, because of: {problem}", warning=True)
            results = list(self.restart({name: processes}))
            yield from results
            if not all(result.ok for result in results):
                yield failed(processes[0].name, f"Both reload and restart failed, process='{processes[0].name}'")

    # ---- systemd

    def _through_systemd(self, verb: str, name: str, processes: list[Process]) -> Iterator[Result]:
        unit = f"zorp@{name}.service"
        result = subprocess.run(["systemctl", verb, unit], check=False)
        if result.returncode:
            yield from (failed(process.name, f"Error invoking 'systemctl {verb} {unit}'") for process in processes)
            return
        running = all(process.is_running() for process in processes)
        if verb == "start":
            text = "Running" if running else "Failed to start"
            yield from (Result(process.name, text, ok=running) for process in processes)
        else:
            yield from (Result(process.name, "Stopped") for process in processes)


def _rules_warning(processes: list[Process]) -> Iterator[Result]:
    """Yield a warning when packet rules are wanted and nobody sees to them; one for all processes of an instance."""
    warning = queries.rules_warning(processes[0])
    if warning is not None:
        yield warning


def _tell_kzorpd(name: str, process: Process) -> Iterator[Result]:
    """Say that an instance has stopped: user 0 is believed, and rules may go (on_stop in kzorp.yml)."""
    try:
        ask(process.kzorpd_path, "stopped", _KZORPD_TIMEOUT_S, instance=name)
    except KzorpdAway:
        return
    except KzorpdError as problem:
        yield Result(process.name, f"warning: packet rules stay as they are: {problem}", warning=True)


def reload_zone_daemon() -> Iterator[Result]:
    """Let kzorpd look at the zones again, where it runs; a failure is told and changes nothing."""
    if os.geteuid() != 0 or not _has_systemd() or not _has_unit("kzorpd.service"):
        return
    active = subprocess.run(["systemctl", "--quiet", "is-active", "kzorpd.service"], check=False)
    if active.returncode == 0 and subprocess.run(["systemctl", "reload", "kzorpd.service"], check=False).returncode:
        yield failed("", "Error during invoking 'systemctl reload kzorpd.service'")


def _is_active(name: str) -> bool:
    """True when the instance runs as a unit; one that was started by hand does not."""
    return subprocess.run(["systemctl", "--quiet", "is-active", f"zorp@{name}.service"], check=False).returncode == 0


def _has_systemd() -> bool:
    return os.path.isdir("/run/systemd/system") and shutil.which("systemctl") is not None


def _has_unit(name: str) -> bool:
    return any(os.path.exists(os.path.join(directory, name)) for directory in _UNIT_DIRECTORIES)


def _managed_by_systemd() -> bool:
    return (os.environ.get("ZORPCTL_STARTED_BY_SYSTEMD") != "true" and _has_systemd()
            and _has_unit("zorp@.service"))
