"""The files of this host that zorpctl works from: its configuration, the instances, two directories.

Theory of operation
    Host.read() reads zorpctl.conf and instances.conf once per invocation.  Problems of single
    lines are printed as warnings and leave the other instances controllable.  select() turns
    the arguments of a command (NAME, NAME#k, @FILE, or none for all) into the processes they
    mean; which processes "all" means depends on the command: those configured, those with a
    pid file, or both.
"""

from __future__ import annotations

import dataclasses
import enum
import grp
import os
import pwd
import shutil
import stat
import sys
from dataclasses import dataclass, field

from Zorp.wire import instances_conf, zorpctl_conf
from Zorp.wire.instances_conf import InstanceLine, Problem
from Zorp.wire.zorpctl_conf import ZorpctlConf
from zorpctl.processes import Process, with_pid_file

DEFAULT_CONF = "/etc/zorp/zorpctl.conf"


class HostError(Exception):
    """The command cannot be carried out on this host; the text is for the administrator."""


class Everything(enum.Flag):
    """What a command without names applies to."""

    CONFIGURED = enum.auto()
    WITH_PID_FILE = enum.auto()
    BOTH = CONFIGURED | WITH_PID_FILE


@dataclass
class Selection:
    """The processes a command is about, by instance, and the arguments that mean nothing."""

    processes: list[Process] = field(default_factory=list)
    whole_instances: bool = True                  # False: a single process NAME#k was named
    problems: list[str] = field(default_factory=list)

    def by_instance(self) -> dict[str, list[Process]]:
        """Return the processes grouped by instance, in order."""
        groups: dict[str, list[Process]] = {}
        for process in self.processes:
            groups.setdefault(process.instance, []).append(process)
        return groups


@dataclass(frozen=True)
class Host:
    """What the configuration says."""

    conf: ZorpctlConf
    instances: dict[str, InstanceLine]
    problems: list[Problem]
    missing: str = ""                             # path of an instances.conf that is not there

    @classmethod
    def read(cls, conf_path: str | None = None) -> Host:
        """Read the configuration; a directory stands for the zorpctl.conf and instances.conf in it.

        Raises HostError when a file exists and cannot be read.
        """
        directory = ""
        if conf_path and os.path.isdir(conf_path):
            directory, conf_path = conf_path, os.path.join(conf_path, "zorpctl.conf")
        text = _read(conf_path or DEFAULT_CONF, required=bool(conf_path and not directory)) or ""
        conf = zorpctl_conf.parse(text, **({"zorp_sysconfdir": directory} if directory else {}))
        conf = dataclasses.replace(
            conf, warnings=tuple(f"{warning} ({conf_path or DEFAULT_CONF})" for warning in conf.warnings))
        path = os.path.join(conf.zorp_sysconfdir, "instances.conf")
        text = _read(path, required=False)
        lines, problems = instances_conf.parse(text or "", conf)
        return cls(conf, {line.name: line for line in lines}, problems, missing="" if text is not None else path)

    @property
    def pid_dir(self) -> str:
        return self.conf.zorp_pidfiledir

    @property
    def zorp(self) -> str:
        """The program zorp: in ZORP_SBINDIR, beside this program, or wherever the path leads."""
        beside = os.path.dirname(os.path.abspath(sys.argv[0]))
        for directory in (self.conf.zorp_sbindir, beside):
            path = os.path.join(directory, "zorp")
            if os.access(path, os.X_OK):
                return path
        return shutil.which("zorp") or os.path.join(self.conf.zorp_sbindir, "zorp")

    def process(self, name: str) -> Process:
        """Return the process of this name."""
        return Process(name, self.pid_dir, self.conf.kzorpd_dir)

    def _with_pid_file(self) -> list[Process]:
        return with_pid_file(self.pid_dir, self.conf.kzorpd_dir)

    def configured(self, name: str) -> list[Process]:
        """Return the processes that instances.conf gives an instance."""
        return [self.process(process_name) for process_name in self.instances[name].process_names]

    def select(self, arguments: list[str], everything: Everything) -> Selection:
        """Return the processes that the arguments of a command mean."""
        selection = Selection()
        names = list(_expand(arguments, selection.problems))
        if not arguments:
            selection.processes = self._all(everything)
        for name in names:
            self._select_one(name, selection)
        selection.processes = list(dict.fromkeys(selection.processes))
        return selection

    def _all(self, everything: Everything) -> list[Process]:
        running = self._with_pid_file()
        configured = [process for name in self.instances for process in self.configured(name)]
        if everything is Everything.CONFIGURED:
            return configured
        if everything is Everything.WITH_PID_FILE:
            return running
        by_hand = [process for process in running if process not in configured]
        return by_hand + configured

    def _select_one(self, name: str, selection: Selection) -> None:
        base, hash_sign, number = name.partition("#")
        if hash_sign and not (number.isascii() and number.isdigit()):
            selection.problems.append(f"Instance: {name} not recognized!")
        elif base in self.instances and not hash_sign:
            selection.processes += self.configured(base)
            selection.processes += [p for p in self._with_pid_file() if p.instance == base]
        elif base in self.instances:
            self._select_number(name, int(number), selection)
        else:
            found = [p for p in self._with_pid_file() if name in (p.name, p.instance)]
            selection.processes += found
            if not found:
                selection.problems.append(f"Instance {name} not found!")

    def _select_number(self, name: str, number: int, selection: Selection) -> None:
        instance = self.instances[name.partition("#")[0]]
        selection.whole_instances = False
        if number >= instance.number_of_processes:
            selection.problems.append(f"{name}: Number {number} must be between [0..{instance.number_of_processes})")
        else:
            selection.processes.append(self.process(f"{instance.name}#{number}"))

    # ---- directories

    def prepare_pid_dir(self) -> None:
        """Create the pid directory when it is missing.  Raises HostError."""
        if os.path.isdir(self.pid_dir):
            return
        conf = self.conf
        try:
            user = pwd.getpwnam(conf.pidfile_dir_owner).pw_uid
            group = grp.getgrnam(conf.pidfile_dir_group).gr_gid
        except KeyError as problem:
            raise HostError(f"Cannot create {self.pid_dir}: {problem.args[0]}; create the user and group, or name "
                            "others as PIDFILE_DIR_OWNER and PIDFILE_DIR_GROUP in zorpctl.conf") from None
        try:
            os.makedirs(self.pid_dir, mode=0o700)
            os.chown(self.pid_dir, user, group)
            os.chmod(self.pid_dir, conf.pidfile_dir_mode)
        except OSError as problem:
            raise HostError(f"Cannot create {self.pid_dir}: {problem.strerror}") from None

    def permission_warnings(self) -> list[str]:
        """Return a line for each directory whose owner, group or mode is not what the configuration asks."""
        conf = self.conf
        if not conf.check_perms:
            return []
        wanted = [("sysconfdir", conf.config_dir, conf.config_dir_owner, conf.config_dir_group, conf.config_dir_mode),
                  ("pidfiledir", self.pid_dir, conf.pidfile_dir_owner, conf.pidfile_dir_group,
                   conf.pidfile_dir_mode)]
        return [f"Permissions not correct on {kind} ({path}). Required user={user} group={group} mode={mode:o}."
                + ("" if os.path.isdir(path) else " There is no such directory.")
                for kind, path, user, group, mode in wanted if not _has_permissions(path, user, group, mode)]

    def refuse_unsafe_configuration(self) -> None:
        """Raise HostError when anybody but root and us could have written the configuration directory."""
        if not self.conf.check_perms:
            return
        try:
            status = os.stat(self.conf.config_dir)
        except OSError:
            return
        if status.st_mode & stat.S_IWOTH or status.st_uid not in (0, os.geteuid()):
            raise HostError(f"{self.conf.config_dir} can be changed by others, nothing is started from it; make it "
                            "owned by root and not writable for all, or set CHECK_PERMS=0 in zorpctl.conf")


def _has_permissions(path: str, user: str, group: str, mode: int) -> bool:
    try:
        status = os.stat(path)
        return (status.st_uid == pwd.getpwnam(user).pw_uid and status.st_gid == grp.getgrnam(group).gr_gid
                and stat.S_IMODE(status.st_mode) & 0o777 == mode & 0o777)
    except (OSError, KeyError):
        return False


def _read(path: str, required: bool) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        if required:
            raise HostError(f"No such file or directory {path}") from None
        return None
    except OSError as problem:
        raise HostError(f"Cannot read {path}: {problem.strerror}") from None


def _expand(arguments: list[str], problems: list[str]):
    """Yield instance names, those of @FILE arguments one per line."""
    for argument in arguments:
        if not argument.startswith("@"):
            yield argument
            continue
        try:
            with open(argument[1:], encoding="utf-8", errors="replace") as file:
                yield from filter(None, map(str.strip, file))
        except OSError:
            problems.append(f"Error opening instance list file: {argument[1:]}.")
