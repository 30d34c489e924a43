"""The command line of zorpctl: which command, for which processes, with which exit status.

    0  everything succeeded     1  something failed     2  wrong usage

Options may stand before and after instance names.  A command spelt with leading dashes
(`zorpctl --start`) works too, as scripts from old releases have it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from zorpctl import metrics, queries
from zorpctl.host import Everything, Host, HostError, Selection
from zorpctl.lifecycle import Lifecycle, reload_zone_daemon
from zorpctl.processes import Process
from zorpctl.report import EXIT_FAILED, EXIT_OK, Result, failed, show
from zorpctl.szig import SzigError

_COREDUMP = ("Creating core dumps with zorpctl is deprecated; gdb's gcore command makes one of a running process:\n"
             "    gcore -o FILE PID")

Results = Iterator[Result]


class Command(NamedTuple):
    """A command: what it does, what "all" means for it, its banner, its options."""

    run: Callable[[Host, Selection, argparse.Namespace], Results]
    everything: Everything
    banner: str = ""
    help: str = ""
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    whole_instances: str = ""              # verb in the refusal of NAME#k, "" when NAME#k is fine
    touches_daemons: bool = False          # starts or reloads: the zone daemon first, safe files only


def _per_process(ask: Callable[[Process, argparse.Namespace], Result | Results]):
    """Turn a question to one process into a command; a process that does not answer is a failure line."""
    def run(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
        for process in selection.processes:
            problem = queries.not_running(process)
            if problem is not None:
                yield problem
                continue
            try:
                answer = ask(process, options)
                yield from [answer] if isinstance(answer, Result) else answer
            except SzigError as refusal:
                yield failed(process.name, str(refusal))
    return run


# ---- commands that need more than one line

def _status(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    if not options.json:
        yield from _per_process(lambda process, options: queries.status(process, options.verbose))(
            host, selection, options)
        return
    states = []
    for process in selection.processes:
        try:
            states.append(queries.facts(process))
        except SzigError as problem:
            states.append({"process": process.name, "running": True, "error": str(problem)})
    complete = all(state["running"] and "error" not in state for state in states)
    print(json.dumps(states, indent=1))
    if not complete:
        yield failed("", "not every process is running")


def _gui_status(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    yield Result("", queries.gui_status(selection.processes))


def _log(process: Process, options: argparse.Namespace) -> Result | Results:
    step = options.vinc - options.vdec
    if options.vset is None and not step and options.log_spec is None:
        return queries.log_settings(process)
    return queries.change_log(process, level=options.vset, step=step, spec=options.log_spec)


def _conns(process: Process, options: argparse.Namespace) -> Results:
    for session in queries.connections(process):
        yield Result("", json.dumps(session) if options.json else queries.connection_line(session))


def _szig(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    for process in selection.processes:
        if not process.is_running():
            yield Result("", f"Process {process.name}: not running")
            continue
        try:
            yield from queries.walk(process, options.root)
        except SzigError as refusal:
            yield failed(process.name, str(refusal))


def _authorize(process: Process, options: argparse.Namespace) -> Result:
    given = options.accept if options.accept is not None else options.reject
    session_id = given or options.session
    if (options.accept is None) == (options.reject is None):
        problem = ("both reject and accept cannot be used" if options.accept is not None else
                   "either the '--accept' or '--reject' option has to be specified")
        return failed("", f"zorpctl authorize: {problem}")
    if not options.description or not session_id:
        return failed("", "zorpctl authorize: description is not specified" if session_id else
                      "zorpctl authorize: proxy instance is not specified")
    return queries.authorize(process, "ACCEPT" if options.accept is not None else "REJECT", session_id,
                             options.description)


def _check(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    lifecycle = Lifecycle(host)
    for name in selection.by_instance():
        instance = host.instances.get(name)
        if instance is None:
            yield failed(name, "Not found in instances.conf")
            continue
        status = subprocess.run([*lifecycle.foreground_command(instance), "--check-policy"], check=False).returncode
        if status:                       # else zorp has said that it is usable
            yield failed(name, f"Policy is not usable (rc='{status}')")


def _explain(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    name = options.instances[0]
    instance = host.instances.get(name)
    if instance is None:
        yield failed(name, "Not found in instances.conf")
        return
    question = [*(["--json"] if options.json else []), "--explain", " ".join(options.words)]
    if subprocess.run([*Lifecycle(host).foreground_command(instance), *question], check=False).returncode:
        yield failed(name, "Cannot explain")


def _exec(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    host.refuse_unsafe_configuration()
    names = list(selection.by_instance())
    if len(names) == 1:
        return Lifecycle(host).replace_us(names[0])
    return iter([failed("", "zorpctl exec: name exactly one instance")])


def _metrics(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    def processes() -> list[Process]:
        """Those that run now, and those that should."""
        return Host.read(options.conf_path).select(options.instances, Everything.BOTH).processes

    try:
        if options.listen is None:
            yield Result("", metrics.text(processes).removesuffix("\n"))
            return
        server = metrics.server(options.listen, processes)
    except metrics.MetricsError as problem:
        yield failed("", f"zorpctl metrics: {problem}")
        return
    yield Result("", f"Listening on {options.listen}")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def _version(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    try:
        result = subprocess.run([host.zorp, "--version"], check=False)
    except OSError as problem:
        yield failed("", f"{host.zorp}: {problem.strerror}; set ZORP_SBINDIR in zorpctl.conf")
        return
    if result.returncode:
        yield failed("", f"{host.zorp} --version failed")


def _stop_session(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    """Ask every process; the session is in one of them at most."""
    ask = _per_process(lambda process, options: queries.stop_session(process, options.session))
    results = list(ask(host, selection, options))
    stopped = [result for result in results if result.ok]
    yield from stopped or results


def _reload(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    return Lifecycle(host).reload(selection.by_instance(), revoke=options.revoke)


def _restart(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    return Lifecycle(host).restart(selection.by_instance(), unchecked=options.force)


def _coredump(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    yield Result("", _COREDUMP)


def _help(host: Host, selection: Selection, options: argparse.Namespace) -> Results:
    yield Result("", usage())


# ---- options of single commands

def _status_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="six lines per process")
    parser.add_argument("--json", action="store_true", help="a JSON array")


def _explain_options(parser: argparse.ArgumentParser) -> None:
    _json_option(parser)
    parser.usage = ("zorpctl explain [--json] INSTANCE tcp|udp CLIENT[:PORT] SERVER:PORT [INTERFACE]\n"
                    "       zorpctl explain [--json] INSTANCE service NAME")
    parser.set_defaults(takes_words=True)


def _reload_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revoke", action="store_true", help="end running sessions that the new policy refuses")


def _restart_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="stop instances whose policy cannot be used, too")


def _log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--vinc", action="count", default=0, help="raise the level by one")
    parser.add_argument("-d", "--vdec", action="count", default=0, help="lower the level by one")
    parser.add_argument("-s", "--vset", type=int, metavar="N", help="set the level, 0 to 10")
    parser.add_argument("-S", "--log-spec", "--logspec", metavar="SPEC", help="set the log specification")


def _szig_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--walk", action="store_true", help="all nodes (the default)")
    parser.add_argument("-r", "--root", default="", metavar="NODE", help="only what is below this node")


def _deadlock_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-e", "--enable", dest="change", action="store_const", const="ENABLE")
    parser.add_argument("-d", "--disable", dest="change", action="store_const", const="DISABLE")


def _authorize_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--accept", nargs="?", const="", metavar="SESSION")
    parser.add_argument("-r", "--reject", nargs="?", const="", metavar="SESSION")
    parser.add_argument("-i", "--session", metavar="SESSION")
    parser.add_argument("-d", "--description", metavar="TEXT")


def _session_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--session", required=True, metavar="SESSION")


def _metrics_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-l", "--listen", metavar="ADDRESS",
                        help="serve them on 127.0.0.1:PORT, [::1]:PORT or unix:PATH")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a JSON object per line")


def _lifecycle(method: str, **keywords):
    return lambda host, selection, options: getattr(Lifecycle(host), method)(selection.by_instance(), **keywords)


CONFIGURED, WITH_PID_FILE, BOTH = Everything.CONFIGURED, Everything.WITH_PID_FILE, Everything.BOTH

COMMANDS = {
    "start": Command(_lifecycle("start"), CONFIGURED, "Starting {}:", "start instances",
                     whole_instances="started", touches_daemons=True),
    "force-start": Command(_lifecycle("start", forced=True), CONFIGURED, "Starting {}:",
                           "start, even with --no-auto-start", whole_instances="started", touches_daemons=True),
    "exec": Command(_exec, CONFIGURED, help="become one instance, in the foreground, for service managers",
                    whole_instances="started"),
    "stop": Command(_lifecycle("stop"), BOTH, "Stopping {}:", "stop instances", whole_instances="stopped"),
    "force-stop": Command(_lifecycle("stop", forced=True), BOTH, "Stopping {}:", "kill instances",
                          whole_instances="stopped"),
    "restart": Command(_restart, BOTH, "Restarting {}:", "stop and start, if the policy is usable",
                       options=_restart_options, whole_instances="started", touches_daemons=True),
    "force-restart": Command(_lifecycle("restart", forced=True), BOTH, "Restarting {}:", "kill and start",
                             whole_instances="started", touches_daemons=True),
    "reload": Command(_reload, WITH_PID_FILE, "Reloading {}:", "load policies again", options=_reload_options,
                      touches_daemons=True),
    "reload-or-restart": Command(_lifecycle("reload_or_restart"), BOTH, "Reloading or Restarting {}:",
                                 "reload, restart what fails", touches_daemons=True),
    "status": Command(_status, BOTH, help="show the state", options=_status_options),
    "gui-status": Command(_gui_status, BOTH, help="the state as a table for programs"),
    "log": Command(_per_process(_log), WITH_PID_FILE, help="query or set log level and specification",
                   options=_log_options),
    "inclog": Command(_per_process(lambda process, options: queries.change_log(process, step=1)), WITH_PID_FILE,
                      "Raising {} loglevel:", "raise the log level"),
    "declog": Command(_per_process(lambda process, options: queries.change_log(process, step=-1)), WITH_PID_FILE,
                      "Decreasing {} loglevel:", "lower the log level"),
    "szig": Command(_szig, WITH_PID_FILE, help="show the statistics tree", options=_szig_options),
    "conns": Command(_per_process(_conns), WITH_PID_FILE, help="show the running sessions", options=_json_option),
    "stop-session": Command(_stop_session, WITH_PID_FILE, help="end one session", options=_session_option),
    "deadlockcheck": Command(
        _per_process(lambda process, options: queries.deadlock_check(process, options.change)), WITH_PID_FILE,
        help="query or switch the deadlock check", options=_deadlock_options),
    "authorize": Command(_per_process(_authorize), WITH_PID_FILE, help="accept or reject a waiting session",
                         options=_authorize_options),
    "check": Command(_check, CONFIGURED, help="load the policies without serving"),
    "explain": Command(_explain, CONFIGURED, help="what a policy does with a connection, and why",
                       options=_explain_options),
    "coredump": Command(_coredump, WITH_PID_FILE, help="how to dump core"),
    "metrics": Command(_metrics, BOTH, help="the state as Prometheus reads it", options=_metrics_options),
    "version": Command(_version, CONFIGURED, help="show the version of zorp"),
    "help": Command(_help, CONFIGURED, help="this text"),
}


def usage() -> str:
    """Return the list of commands."""
    lines = [f"    {name:18} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: zorpctl [-c CONF] COMMAND [OPTIONS] [INSTANCE | INSTANCE#N | @FILE ...]", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    general = argparse.ArgumentParser(prog="zorpctl", usage=usage().partition(" ")[2], add_help=False)
    general.add_argument("-c", "--config", metavar="CONF", help="another zorpctl.conf, or a directory that has one")
    general.add_argument("-h", "--help", action="store_true")
    split = next((i for i, word in enumerate(arguments) if _command(word)), len(arguments))
    options, rest = general.parse_known_args(arguments[:split])
    if options.help:
        print(usage())
        return EXIT_OK
    if split == len(arguments):
        unknown = next((word for word in rest if not word.startswith("-")), None)
        general.error(f"invalid choice: '{unknown}'" if unknown else
                      f"unknown option: '{rest[0]}'" if rest else "a command is required")
    try:
        return _run(_command(arguments[split]), arguments[split + 1:], options.config)
    except BrokenPipeError:                          # `zorpctl szig | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (HostError, OSError) as problem:
        print(problem, file=sys.stderr)
        return EXIT_FAILED


def _command(word: str) -> str | None:
    """Return the command that a word names, also with leading dashes; None when it names none."""
    bare = word[2:] if word.startswith("--") and word != "--help" else word
    return bare if bare in COMMANDS else None


def _run(name: str, arguments: list[str], conf_path: str | None) -> int:
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"zorpctl {name}", description=command.help)
    command.options(parser)
    parser.add_argument("instances", nargs="*", metavar="INSTANCE")
    options = parser.parse_intermixed_args(arguments)
    options.conf_path = conf_path
    if getattr(options, "takes_words", False):
        if len(options.instances) < 3:
            parser.error("name an instance and what to explain")
        options.instances, options.words = options.instances[:1], options.instances[1:]
    host = Host.read(conf_path)
    _warn(host)
    if name in ("version", "help", "coredump"):
        return show(command.run(host, Selection(), options))
    host.prepare_pid_dir()
    if host.missing and command.everything is not Everything.WITH_PID_FILE:
        print(f"No such file or directory {host.missing}", file=sys.stderr)
        return EXIT_FAILED
    selection = host.select(options.instances, command.everything)
    return _carry_out(command, host, selection, options)


def _carry_out(command: Command, host: Host, selection: Selection, options: argparse.Namespace) -> int:
    if command.touches_daemons:
        host.refuse_unsafe_configuration()
    if command.banner:
        print(command.banner.format(host.conf.product_name), flush=True)
    if command.everything is Everything.CONFIGURED and not (
            host.instances or selection.processes or selection.problems):
        print(f"There is no instance; name one in {host.conf.zorp_sysconfdir}/instances.conf", file=sys.stderr)
    if command.touches_daemons:
        for result in reload_zone_daemon():
            print(result, file=sys.stderr)
    for problem in selection.problems:
        print(problem, file=sys.stderr)
    if command.whole_instances and not selection.whole_instances:
        print(f"Processes can not be {command.whole_instances} individualy", file=sys.stderr)
        return EXIT_FAILED
    status = show(command.run(host, selection, options))
    fatal = any(problem.fatal for problem in host.problems) and not options.instances
    return EXIT_FAILED if selection.problems or fatal else status


def _warn(host: Host) -> None:
    for warning in (*host.conf.warnings, *host.problems, *host.permission_warnings()):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
