"""The program zorp: command line, process mode, set-up of the master, exit status.

    0      normal end, --version, --help
    1      bad command line, or the process cannot be set up
    2      the first policy could not be loaded
    n      quit(n) of the policy

The order of the set-up: command line; leave the terminal; descriptor limit; connection to the
log; names of user and group; root directory, user, capabilities; pid file locks; then the
master begins.  What has to be reached from inside a new root is opened before.
"""

from __future__ import annotations

import os
import sys
import time

from Zorp import Log
from Zorp.Log import log
from Zorp.process.notify import BadWatchdogTime, Notifier
from Zorp.runtime import check, daemonise, privileges
from Zorp.runtime import options as command_line
from Zorp.runtime.control import ControlError
from Zorp.runtime.logsetup import LogSetup, warn_about_shadowed_items
from Zorp.runtime.master import Master, version
from Zorp.runtime.options import Mode, Options, UsageError
from Zorp.runtime.pidfile import AlreadyRunning, Directory
from Zorp.runtime.privileges import SetupError
from Zorp.runtime.slots import Slot
from Zorp.runtime.supervision import Reporter
from Zorp.runtime.worker import EXIT_OK, EXIT_SETUP

VERSION = version()


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    try:
        options = command_line.parse(sys.argv[1:] if arguments is None else arguments)
    except UsageError as problem:
        print(problem, file=sys.stderr)
        return EXIT_SETUP
    if options.action == "version":
        print(version_text())
        return EXIT_OK
    if options.action not in ("run", *_LOADING_ACTIONS):
        print(command_line.help_text(options.action), end="")
        return EXIT_OK
    if options.action != "run" or options.syslog or options.log_format == "classic":     # else in the log alone
        for warning in options.warnings:
            print(f"{options.instance}: {warning}", file=sys.stderr)
        for option in options.obsolete:
            print(f"{options.instance}: Obsolete command line option ignored; option='{option}'", file=sys.stderr)
    return _LOADING_ACTIONS.get(options.action, _run)(options)


_LOADING_ACTIONS = {"check": check.run, "describe": check.print_description, "explain": check.explain}


def version_text() -> str:
    """What --version prints; scripts cut field 2 of the first line."""
    return f"Zorp {VERSION}\nPython: {sys.version.split()[0]}\nCaps: on\n"


def _run(options: Options) -> int:
    daemonise.occupy_standard_descriptors()
    report = daemonise.detach(options) if options.mode.detached else daemonise.StartReport()
    try:
        return _set_up(options, report).run()
    except (SetupError, ControlError) as problem:
        print(f"{options.instance}: {problem}", file=sys.stderr)
        report(EXIT_SETUP)
        return EXIT_SETUP


def _set_up(options: Options, report: daemonise.StartReport) -> Master:
    """Bring the process into its final shape.  Raises SetupError."""
    limited = privileges.raise_descriptor_limit(options.fd_limit)
    is_default = options.fd_limit == Options.fd_limit        # who did not ask for it finds the complaint in the log
    complaints = [None if is_default else limited]
    if options.enable_core:
        complaints.append(privileges.allow_core_dumps(os.getcwd()))
    log_setup = _set_up_log(options)
    reporter = Reporter(options.process_names[0], log_setup)
    try:
        notifier = Notifier()
    except BadWatchdogTime as problem:
        log(None, "core.error", 0, "WATCHDOG_USEC has invalid value; error='%s'", (problem,))
        raise SetupError(f"WATCHDOG_USEC has invalid value; error='{problem}'") from None
    wanted = privileges.prepare(options)
    directory = _open_directory(options, wanted)
    privileges.drop(wanted)
    for complaint in filter(None, complaints):
        reporter(complaint)
    slots = _slots(options, directory)
    log(None, "core.debug", 0, "Starting up; verbose_level='%d', version='%s', startup_id='%d'",
        (options.verbosity, VERSION, int(time.time())))
    if limited is not None and is_default:
        log(None, "core.info", 4, "%s", (limited,))
    if options.log_format != "classic":
        for warning in options.warnings:
            log(None, "core.error", 2, "%s", (warning,))
    for option in options.obsolete:
        log(None, "core.error", 2, "Obsolete command line option ignored; option='%s'", (option,))
    warn_about_shadowed_items()
    daemonise.title.show_master(options.process_names[0])
    return Master(options, slots, directory, log_setup, reporter, notifier, report)


def _set_up_log(options: Options) -> LogSetup:
    try:
        return LogSetup(options)
    except Log.BadLogSpec as problem:
        log(None, "core.error", 0, "Invalid logspec; logspec='%s'", (options.log_spec,))
        raise SetupError(f"Error initializing logging subsystem; logspec='{options.log_spec}', "
                         f"error='{problem}'") from None


def _open_directory(options: Options, wanted: privileges.Privileges) -> Directory:
    """The directory of pid files and control sockets, made when it is missing and we may."""
    try:
        return Directory(options.pid_dir, wanted.uid, wanted.gid)
    except OSError as problem:
        raise _unusable_directory("--pid-dir", options.pid_dir, problem) from None


def _unusable_directory(option: str, path: str, problem: OSError) -> SetupError:
    return SetupError(f"Cannot use the directory of pid files, create it or give {option}; "
                      f"dir='{path}', error='{problem.strerror}'")


def _slots(options: Options, directory: Directory) -> list[Slot]:
    """One slot per virtual process, each with its lock taken.  Raises SetupError."""
    slots = []
    for index, name in enumerate(options.process_names):
        file = options.pid_file if options.pid_file and not options.processes else f"zorp-{name}.pid"
        try:
            pid_file = directory.pid_file(file, kept=options.mode is not Mode.SYSTEMD_NOTIFY)
        except OSError as problem:
            raise _unusable_directory("another --pidfile", os.path.dirname(file), problem) from None
        is_master = index == 0 if options.processes else options.is_master
        try:
            pid_file.acquire()
        except AlreadyRunning:
            raise SetupError("Another process of this name is running, this one is not started; "
                             f"pid_file='{pid_file.path}'") from None
        except OSError as problem:
            raise SetupError("Cannot write the pid file's lock, look at the directory's owner and mode; "
                             f"file='{pid_file.path}.lock', error='{problem.strerror}'") from None
        slots.append(Slot(name, is_master, pid_file))
    return slots
