"""status, statistics, log level, sessions: questions and small orders to running processes.

Every function takes one process and asks its control socket; SzigError means that it did not
answer and becomes a failure line in cli.  Numbers come from the statistics tree of the daemon
(nodes `stats`, `info`, `service`, `conns`), process times and memory from /proc.
"""

from __future__ import annotations

import csv
import io
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from Zorp.Log import DEFAULT_SPEC, BadLogSpec, parse_spec, unrecorded
from zorpctl.processes import Process
from zorpctl.report import Result, failed
from zorpctl.szig import SzigClient, SzigError, components

MISSING = "missing"
UNATTENDED = "unattended"
RULES_REMEDY = ("kzorpd does not run, at most what was loaded before is in force, see kzorp-setup status "
                "(systemctl enable --now kzorp-setup kzorpd; who does without it says --packet-rules administrator or "
                "none)")
_KZORPD_TIMEOUT_S = 2.0
LOG_LEVEL_RANGE = (0, 10)
_GUI_COLUMNS = ("process", "processnum", "status", "pid", "running threads", "total threads",
                "thread1avg", "thread5avg", "thread15avg")
_GUI_NODES = ("stats.threads_running", "stats.thread_number", "stats.thread_rate_avg1", "stats.thread_rate_avg5",
              "stats.thread_rate_avg15")
_PROC_UTIME, _PROC_STIME, _PROC_STARTED, _PROC_VSIZE, _PROC_RSS = 11, 12, 19, 20, 21   # behind the name


def not_running(process: Process) -> Result | None:
    """Return the failure of a process that does not run, None for one that does."""
    if process.is_running():
        return None
    pid = process.worker_pid()
    if pid is None:
        return failed(process.name, "Process not running")
    return failed(process.name, f"Invalid pid file no running process with pid {pid}!")


def facts(process: Process) -> dict:
    """Return the state of a process as plain data, for --json and for the status line."""
    if not process.is_running():
        return {"process": process.name, "running": False, "pid": process.worker_pid()}
    with SzigClient(process.socket_path) as szig:
        values = {node: szig.value(node) for node in (
            "stats.threads_running", "stats.sessions_running", "info.policy.file", "info.policy.file_stamp",
            "info.policy.reload_stamp", "info.version", "info.pid", "info.policy.generations",
            "info.policy.load_started", "info.policy.packet_rules")}
        sessions = _number(values["stats.sessions_running"]) or 0
        has_drained = (_number(values["info.policy.generations"]) or 1) > 1
        draining = max(0, len(_sessions(process, szig)) - sessions) if has_drained else 0
    pid = process.worker_pid() or _number(values["info.pid"])
    return {
        "process": process.name, "running": True, "pid": pid, "master_pid": process.master_pid(),
        "version": values["info.version"], "threads": _number(values["stats.threads_running"]),
        "sessions": sessions, "draining_sessions": draining,
        "policy_file": values["info.policy.file"],
        "policy_loaded": _number(values["info.policy.reload_stamp"]),
        "policy_load_started": _number(values["info.policy.load_started"]) or None,
        "policy_current": is_current(values["info.policy.file"], values["info.policy.file_stamp"]),
        "packet_rules": _packet_rules(process, values["info.policy.packet_rules"]),
        **resources(pid),
    }


def status(process: Process, verbose: bool) -> Result:
    """Return the line, or with `verbose` the six lines, of `zorpctl status`."""
    problem = not_running(process)
    if problem is not None:
        return problem
    state = facts(process)
    parts = ["running", *([] if state["policy_current"] else ["policy NOT reloaded"]),
             f"{state['threads']} threads active",
             *([f"{state['draining_sessions']} sessions of older policies"] if state["draining_sessions"] else []),
             *([f"policy being loaded since {_clock(state['policy_load_started'])}"]
               if state["policy_load_started"] else []),
             *([f"packet rules NOT attended: {RULES_REMEDY}"] if state["packet_rules"] == UNATTENDED else []),
             f"pid {state['pid']}"]
    lines = [", ".join(parts)]
    if verbose:
        lines += [
            f"started at: {_clock(state['started'])}",
            f"policy: file={state['policy_file']}, loaded={_clock(state['policy_loaded'])}",
            f"cpu: real={_minutes(state['cpu_user_s'] + state['cpu_system_s'])}, "
            f"user={_minutes(state['cpu_user_s'])}, sys={_minutes(state['cpu_system_s'])}",
            f"memory: vsz={state['vsz_kib']}kB, rss={state['rss_kib']}kB",
            f"sessions: running={state['sessions']}, of older policies={state['draining_sessions']}",
        ]
    return Result(process.name, "\n".join(lines))


def rules_warning(process: Process) -> Result | None:
    """Return a warning when nobody sees to the packet rules of a running process; None: all well, or no answer."""
    try:
        with SzigClient(process.socket_path) as szig:
            state = _packet_rules(process, szig.value("info.policy.packet_rules"))
    except SzigError:
        return None
    if state != UNATTENDED:
        return None
    return Result(process.name, f"warning: packet rules are NOT attended, {RULES_REMEDY}", warning=True)


def _packet_rules(process: Process, keeper: str) -> str:
    """Say who sees to the packet rules of a process: "kzorpd", "none" (nobody has to), or UNATTENDED (nobody does)."""
    if keeper != "kzorpd":
        return "none"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_KZORPD_TIMEOUT_S)
        try:
            sock.connect(process.kzorpd_path)
        except (FileNotFoundError, ConnectionRefusedError):
            return UNATTENDED
        except OSError:                  # it is there; whether it answers us is another matter
            return keeper
    return keeper


def gui_status(processes: list[Process]) -> str:
    """Return the table of `zorpctl gui-status`: semicolons, every field quoted, one empty line at the end."""
    output = io.StringIO()
    writer = csv.writer(output, delimiter=";", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(_GUI_COLUMNS)
    for process in processes:
        writer.writerow(_gui_row(process))
    return output.getvalue()


def _gui_row(process: Process) -> list[str]:
    number = process.name.partition("#")[2] or "0"
    try:
        if not process.is_running():
            raise SzigError
        with SzigClient(process.socket_path) as szig:
            values = [szig.value(node) or "0" for node in _GUI_NODES]
            pid = process.worker_pid() or szig.value("info.pid")
    except SzigError:
        return [process.name, number, *[MISSING] * (len(_GUI_COLUMNS) - 2)]
    return [process.name, number, "running", str(pid), *values]


# ---- log level

def log_settings(process: Process) -> Result:
    """Return verbosity and log specification."""
    with SzigClient(process.socket_path) as szig:
        level, spec = szig.order("LOGGING VGET"), szig.order("LOGGING GETSPEC")
    return Result(process.name, f"verbose_level={level}, logspec='{spec}'")


def change_log(process: Process, *, level: int | None = None, step: int = 0,
               spec: str | None = None) -> Iterator[Result]:
    """Set the level, or change it by `step`, and set the specification."""
    with SzigClient(process.socket_path) as szig:
        if level is not None or step:
            wanted = level if level is not None else int(szig.order("LOGGING VGET")) + step
            if not LOG_LEVEL_RANGE[0] <= wanted <= LOG_LEVEL_RANGE[1]:
                yield failed(process.name, f"Log level is out of range, {LOG_LEVEL_RANGE[0]} to {LOG_LEVEL_RANGE[1]}")
            else:
                yield Result(process.name, f"New verbose_level={szig.order(f'LOGGING VSET {wanted}')}")
        if spec is not None:
            try:
                yield Result(process.name, f"New logspec='{szig.order(f'LOGGING SETSPEC {spec}')}'")
            except SzigError:
                yield failed(process.name, "Log specification has not been set. It is a list of category:level, as "
                             f"'{DEFAULT_SPEC}'{_what_is_wrong_with(spec)}")
                return
            missing = unrecorded(spec)
            if missing:
                yield Result(process.name, f"warning: this specification does not name {', '.join(missing)}: below "
                             f"verbosity 4 they are not logged; to keep them: zorpctl log -S '{_with_records(spec)}'",
                             warning=True)


def _what_is_wrong_with(spec: str) -> str:
    try:
        parse_spec(spec)
    except BadLogSpec as problem:
        return f"; {problem}"
    return ""


def _with_records(spec: str) -> str:
    return f"{DEFAULT_SPEC},{spec}" if spec else DEFAULT_SPEC


# ---- statistics tree, sessions

def walk(process: Process, root: str) -> Iterator[Result]:
    """Return every node below `root`, sorted, depth first; a warning when there is no such node."""
    with SzigClient(process.socket_path) as szig:
        nodes = szig.dump(root)
        exists = len(nodes) != 1 or nodes[0][1] != "None" or _is_node(szig, root)
    yield Result("", "\n".join([f"Process {process.name}: walking", *(f"{name}: {value}" for name, value in nodes)]))
    if not exists:
        yield Result(process.name, f"There is no node {root} now", warning=True)


def _is_node(szig: SzigClient, name: str) -> bool:
    """Whether a node without value exists: the protocol answers None for both."""
    parent = name.rpartition(".")[0]
    child = szig.ask(f"GETCHILD {parent}")
    while child not in (name, "None"):
        child = szig.ask(f"GETSBLNG {child}")
    return child == name


def connections(process: Process) -> list[dict[str, str]]:
    """Return the properties of every running session, also of those under policies before the last reload."""
    with SzigClient(process.socket_path) as szig:
        return _sessions(process, szig)


def _sessions(process: Process, szig: SzigClient) -> list[dict[str, str]]:
    sessions: dict[str, dict[str, str]] = {}
    for name, value in szig.dump("conns"):
        owner, _, key = name.rpartition(".")
        if name.count(".") == 5:
            service = components(owner)[1]
            sessions.setdefault(owner, {"process": process.name, "service": service})[key] = value
    return list(sessions.values())


def connection_line(session: dict[str, str]) -> str:
    """Return a session as key=value;key=value;"""
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace(";", "\\;")
    return "".join(f"{key}={escaped(value)};" for key, value in session.items())


def stop_session(process: Process, session_id: str) -> Result:
    """End one session."""
    with SzigClient(process.socket_path) as szig:
        return Result(process.name, szig.order(f"STOPSESSION {session_id}"))


def authorize(process: Process, verdict: str, session_id: str, description: str) -> Result:
    """Accept or reject a session that waits for an administrator."""
    with SzigClient(process.socket_path) as szig:
        try:
            return Result(process.name, szig.order(f"AUTHORIZE {verdict} {session_id} {description}"))
        except SzigError as refusal:
            return failed(process.name, f"{refusal}; no proxy of this release waits for an administrator")


def deadlock_check(process: Process, change: str | None) -> Result:
    """Return, after an optional ENABLE or DISABLE, whether the check is on."""
    with SzigClient(process.socket_path) as szig:
        if change:
            szig.order(f"DEADLOCKCHECK {change}")
        return Result(process.name, f"Deadlockcheck={szig.order('DEADLOCKCHECK GET') == '1'}")


# ---- /proc

def resources(pid: int | None) -> dict:
    """Return start time, processor time and memory of a process; zeros when it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines()
                      if line.startswith("btime"))
    except (OSError, StopIteration):
        return {"started": None, "cpu_user_s": 0.0, "cpu_system_s": 0.0, "vsz_kib": 0, "rss_kib": 0}
    ticks = os.sysconf("SC_CLK_TCK")
    return {
        "started": booted + int(fields[_PROC_STARTED]) // ticks,
        "cpu_user_s": int(fields[_PROC_UTIME]) / ticks, "cpu_system_s": int(fields[_PROC_STIME]) / ticks,
        "vsz_kib": int(fields[_PROC_VSIZE]) // 1024,
        "rss_kib": int(fields[_PROC_RSS]) * os.sysconf("SC_PAGE_SIZE") // 1024,
    }


def is_current(path: str | None, stamp: str | None) -> bool:
    """Return whether a policy file still has the stamp it was loaded with."""
    try:
        return path is not None and stamp is not None and int(os.stat(path).st_mtime) == int(float(stamp))
    except (OSError, ValueError):
        return False


def _number(text: str | None) -> int | None:
    try:
        return int(float(text)) if text else None
    except ValueError:
        return None


def _clock(seconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds is not None else "unknown"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{seconds % 60:.6f}"
