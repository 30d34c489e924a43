#!/usr/bin/env python3
"""Nagios: does every Zorp process run, and how near are its threads to the limit?

    check_zorp_threads.py [-w PERCENT] [-c PERCENT] [-v]

    0  OK         1  WARNING: names;        running threads reach the warning level
    3  UNKNOWN    2  CRITICAL: names; ...   they reach the critical level, or a process does not run

UNKNOWN is also what the check says of itself when it cannot work, never WARNING.

The limit is --threads of the instance in instances.conf.  An instance with --no-auto-start that
does not run is in order.  Needs the group zorp, not root.  ZORPCTL_CONF names another zorpctl.conf.
"""

from __future__ import annotations

import argparse
import os
import sys

OK, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, 3

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
try:
    from Zorp.runtime import options as zorp_options
    from Zorp.wire.instances_conf import InstanceLine
    from zorpctl import queries
    from zorpctl.host import Host, HostError
    from zorpctl.processes import Process
    from zorpctl.szig import SzigError
except ImportError as problem:
    print(f"UNKNOWN the check is not beside the firewall's Python packages, install it with make install: {problem}")
    sys.exit(UNKNOWN)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Wrong usage says nothing about Zorp."""
        print(f"UNKNOWN {message}")
        sys.exit(UNKNOWN)


def _percent(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 99:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 to 99")
    return int(text)


def limit_of(instance: InstanceLine) -> int:
    """Return the most threads of a process; the daemon's default where the line does not say."""
    try:
        return zorp_options.parse(list(instance.zorp_args)).threads
    except zorp_options.UsageError:
        return zorp_options.Options.threads


def state_of(process: Process, instance: InstanceLine, warning: int, critical: int) -> tuple[int, str]:
    """Return the state of a process and why."""
    if not process.is_running():
        return (CRITICAL if instance.auto_start else OK), "not running"
    try:
        threads = queries.facts(process)["threads"]
    except SzigError as problem:
        return CRITICAL, str(problem)
    if threads is None:
        return CRITICAL, "no answer"
    limit = limit_of(instance)
    state = CRITICAL if threads * 100 >= limit * critical else WARNING if threads * 100 >= limit * warning else OK
    return state, f"{threads} of {limit} threads"


def main() -> int:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-w", "--warning", type=_percent, default=75, metavar="PERCENT")
    parser.add_argument("-c", "--critical", type=_percent, default=90, metavar="PERCENT")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line per process")
    options = parser.parse_args()
    try:
        host = Host.read(os.environ.get("ZORPCTL_CONF"))
    except HostError as problem:
        print(f"UNKNOWN {problem}")
        return UNKNOWN
    if host.missing:
        print(f"UNKNOWN No such file or directory {host.missing}")
        return UNKNOWN
    try:
        states = {process.name: state_of(process, instance, options.warning, options.critical)
                  for name, instance in host.instances.items() for process in host.configured(name)}
    except OSError as problem:
        print(f'CRITICAL "zorpctl" problem. {problem}')
        return CRITICAL
    return report(states, [str(problem) for problem in host.problems if problem.fatal], options.verbose)


def report(states: dict[str, tuple[int, str]], unusable: list[str], verbose: bool) -> int:
    """Print the result; return the exit status."""
    critical = [*(name for name, (state, _why) in states.items() if state == CRITICAL), *unusable]
    warning = [name for name, (state, _why) in states.items() if state == WARNING]
    parts = [f"{word}: {', '.join(names)};" for word, names in (("CRITICAL", critical), ("WARNING", warning)) if names]
    print(" ".join(parts) or "OK")
    if verbose:
        print("\n".join(f"{name}: {why}" for name, (_state, why) in states.items()))
    return CRITICAL if critical else WARNING if warning else OK


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as problem:         # a status of 1 would be WARNING
        print(f"UNKNOWN the check itself failed: {type(problem).__name__}: {problem}")
        sys.exit(UNKNOWN)
