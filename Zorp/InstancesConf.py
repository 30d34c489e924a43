"""The instances of this host, read from instances.conf and zorpctl.conf.

    for instance in InstancesConf():
        print(instance.name, instance.number_of_processes)

Lines that cannot be used are left out; `problems` says which and why.  A missing file raises
IOError when the object is made.
"""

from __future__ import annotations

import argparse
import os
import sys

from Zorp.Config import config
from Zorp.Instance import Instance
from Zorp.wire import instances_conf, zorpctl_conf
from Zorp.wire.zorpctl_conf import ZorpctlConf as ZorpctlConfig

__all__ = ["Instance", "InstancesConf", "ZorpctlConfig", "argparse", "read_zorpctl_conf", "sys"]


def read_zorpctl_conf(path):
    """Return the settings in a zorpctl.conf, the defaults when the file does not exist."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return zorpctl_conf.parse(file.read())
    except FileNotFoundError:
        return ZorpctlConfig()


class InstancesConf:
    """Iterates over the instances of a directory's instances.conf, in file order."""

    instances_conf_file = None

    def __init__(self, directory=None, conf=None):
        directory = directory or config.dirs.sysconfdir
        self.instances_conf_path = os.path.join(directory, "instances.conf")
        self.ZORPCTLCONF = conf or read_zorpctl_conf(os.path.join(directory, "zorpctl.conf"))
        with open(self.instances_conf_path, encoding="utf-8", errors="replace") as file:
            self.lines, self.problems = instances_conf.parse(file.read(), self.ZORPCTLCONF)
        self._remaining = iter(self.lines)

    def __iter__(self):
        return self

    def __next__(self):
        line = next(self._remaining)
        return Instance(name=line.name, zorp_argv=line.zorp_args, auto_restart=line.auto_restart,
                        auto_start=line.auto_start, enable_core=line.enable_core,
                        number_of_processes=line.number_of_processes)

    next = __next__
