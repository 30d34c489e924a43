"""An instance as tools and plugins of sites see it: a name, its arguments, its processes."""

from __future__ import annotations

import argparse
import re
import shlex

_OLD_SPELLINGS = {"--logspec": "--log-spec", "--user": "--uid", "--group": "--gid"}
_SHORT_VERBOSE = re.compile(r"-v(\d+)")


class ZorpInstanceArgumentParser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of ending the process."""

    def error(self, message):
        raise ValueError(f"Error parsing Zorp instance arguments: {message}")


def _parser():
    parser = ZorpInstanceArgumentParser(prog="zorp", add_help=False, allow_abbrev=False)
    for option in ("--log-tags", "--log-escape", "--enable-core"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("-N", "--no-caps", action="store_true")
    parser.add_argument("-p", "--policy", default="/etc/zorp/policy.py")
    parser.add_argument("--threads", type=int, default=1000)
    parser.add_argument("--verbose", type=int, default=3)
    parser.add_argument("--fd-limit-min", type=int)
    parser.add_argument("--stack-size", type=int)
    for option in ("--log-spec", "--process-mode", "--uid", "--gid", "--caps", "--chroot", "--crypto-engine"):
        parser.add_argument(option)
    return parser


class ZorpProcess:
    """The parsed options of a zorp command line, as attributes of `args`.

    Options that only zorp itself understands are left to it and listed in `args.unknown`.
    """

    def __init__(self, zorp_argv):
        words = shlex.split(zorp_argv) if isinstance(zorp_argv, str) else list(zorp_argv)
        self.args, self.args.unknown = _parser().parse_known_args([_modern(word) for word in words])


def _modern(word):
    option, equals, value = word.partition("=")
    if match := _SHORT_VERBOSE.fullmatch(word):
        return f"--verbose={match[1]}"
    return _OLD_SPELLINGS.get(option, option) + equals + value


class Instance:
    """One process of an instance, or the instance as a whole when process_num is None.

    Keywords: name, process_num, zorp_argv (words of the command line), auto_restart, auto_start,
    number_of_processes, enable_core, manually_started.
    """

    def __init__(self, **kwargs):
        self.name = kwargs.get("name", "")
        self.process_num = kwargs.get("process_num")
        self.zorp_argument_list = list(kwargs.get("zorp_argv", ()))
        self.zorp_process = ZorpProcess(self.zorp_argument_list)
        self.auto_restart = kwargs.get("auto_restart", True)
        self.auto_start = kwargs.get("auto_start", True)
        self.number_of_processes = kwargs.get("number_of_processes", 1)
        self.enable_core = kwargs.get("enable_core", False)
        self.manually_started = kwargs.get("manually_started", False)

    @property
    def process_name(self):
        """NAME for an instance started by hand, else NAME#k."""
        return self.name if self.manually_started else f"{self.name}#{self.process_num}"

    @process_name.setter
    def process_name(self, value):
        self.name, self.process_num = self.splitInstanceName(value)

    @staticmethod
    def splitInstanceName(instance_name):
        """Return (name, number) of NAME#number, (name, None) of NAME; raises ValueError."""
        name, hash_sign, number = instance_name.partition("#")
        return (name, int(number)) if hash_sign else (name, None)
