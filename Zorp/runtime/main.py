"""The program zorp: command line, process mode, exit status.

    0      normal end, --version, --help
    1      bad command line, or the process cannot be set up
    2      the first policy could not be loaded
    n      quit(n) of the policy
"""

from __future__ import annotations

import os
import sys
import time

import Zorp
from Zorp import Log
from Zorp.Log import log
from Zorp.runtime import options as command_line
from Zorp.runtime.logsetup import LogSetup
from Zorp.runtime.master import Master, Slot
from Zorp.runtime.options import Options, UsageError
from Zorp.runtime.pidfile import AlreadyRunning, PidFile
from Zorp.runtime.worker import EXIT_OK, EXIT_SETUP


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
    if options.action != "run":
        print(command_line.help_text(options.action), end="")
        return EXIT_OK
    return _run(options)


def version_text() -> str:
    """What --version prints; scripts cut field 2 of the first line."""
    major = Zorp.__version__.partition(".")[0]
    return f"Zorp {major} ({Zorp.__version__})\nPython: {sys.version.split()[0]}\nCaps: on"


def _run(options: Options) -> int:
    for warning in options.warnings:
        print(f"{options.instance}: {warning}", file=sys.stderr)
    slots = [Slot(name, options.is_master if not options.processes else index == 0,
                  PidFile(pid_path(options, name)))
             for index, name in enumerate(options.process_names)]
    try:
        for slot in slots:
            slot.pid_file.acquire()
    except AlreadyRunning as problem:
        print(f"{options.instance}: Another process of this name is running, not started; pid_file='{problem}'",
              file=sys.stderr)
        return EXIT_SETUP
    except OSError as problem:
        print(f"{options.instance}: Cannot write the pid directory, create it or give --pid-dir; "
              f"file='{problem.filename}', error='{problem.strerror}'", file=sys.stderr)
        return EXIT_SETUP
    try:
        LogSetup(options)
    except Log.BadLogSpec:
        print(f"{options.instance}: Error initializing logging subsystem", file=sys.stderr)
        return EXIT_SETUP
    major = Zorp.__version__.partition(".")[0]
    log(None, "core.debug", 0, "Starting up; verbose_level='%d', version='%s', startup_id='%d'",
        (options.verbosity, f"{major} ({Zorp.__version__})", int(time.time())))
    return Master(options, slots, lambda status: None).run()


def pid_path(options: Options, process_name: str) -> str:
    """The pid file of one virtual process."""
    name = options.pid_file if options.pid_file and not options.processes else f"zorp-{process_name}.pid"
    return os.path.join(options.pid_dir, name)
