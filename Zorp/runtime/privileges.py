"""Who the process runs as: root directory, user, group, capabilities, limits.

Theory of operation
    prepare() looks names up while the real root directory is still there; drop() then goes the
    one way: chroot, group, supplementary groups, user, capabilities.  Both run in the master
    before it forks anything.  A failure is fatal (SetupError, exit status 1), because going on
    with more rights than asked for is worse than not starting; only the kernel's refusal to
    grant capabilities that an ordinary user never had is a message.

    The master keeps CAP_NET_RAW and CAP_NET_BIND_SERVICE, which its listening sockets need, and
    what --caps names beyond them, but never CAP_NET_ADMIN: packet rules are somebody else's job.
    A worker that has loaded its policy lets go of what this policy does not use (give_up()).

Started by user 0 it becomes user zorp; where there is none, and --user names no other, it does not
start.  Only what loads a policy and serves nothing (--check-policy) goes on, without capabilities.
"""

from __future__ import annotations

import codecs
import dataclasses
import grp
import os
import pwd
import resource
from collections.abc import Callable

from Zorp.Log import log
from Zorp.process import capabilities
from Zorp.runtime.options import Options

DEFAULT_USER = "zorp"
_NEEDED = 1 << capabilities.CAP_NET_RAW | 1 << capabilities.CAP_NET_BIND_SERVICE
_NO_ID = (1 << 32) - 1           # means "leave it as it is" to setresuid()
_MAKE_USER = "create it with systemd-sysusers or useradd --system"
_LATE_ENCODINGS = ("idna", "latin-1", "ascii", "utf-8")
_LOST_FEATURE = {
    capabilities.CAP_NET_RAW: "transparent proxying and marks",
    capabilities.CAP_NET_BIND_SERVICE: "ports below 1024",
}


class SetupError(Exception):
    """The process cannot be set up as asked; `str()` is for the administrator."""


@dataclasses.dataclass(frozen=True, slots=True)
class Privileges:
    """What drop() is going to do, with every name looked up."""

    uid: int | None
    gid: int | None
    user_name: str | None        # for initgroups()
    root: str | None
    capabilities: int | None     # None: leave them alone
    core_dumps: bool = False


def prepare(options: Options) -> Privileges:
    """Look up user, group and capabilities.  Raises SetupError."""
    user, group = options.user, options.group
    if os.getuid() == 0 and user is None:
        if _exists(pwd.getpwnam, DEFAULT_USER):
            user, group = DEFAULT_USER, group or DEFAULT_USER
        elif options.action == "run":
            raise SetupError(f"There is no user '{DEFAULT_USER}' to run as; {_MAKE_USER}, or name another with --user "
                             "and --group (--user root stays root without its capabilities)")
    try:
        kept = None if options.no_caps else capabilities.parse(options.caps) & ~(1 << capabilities.CAP_NET_ADMIN)
    except ValueError as problem:
        raise SetupError(f"Error parsing capabilities; caps='{options.caps}', error='{problem}'") from None
    uid = _resolve("user", user, pwd.getpwnam, lambda found: found.pw_uid)
    gid = _resolve("group", group, grp.getgrnam, lambda found: found.gr_gid)
    return Privileges(uid, gid, _name_of(uid), options.chroot, kept, options.enable_core)


def _exists(look_up: Callable, name: str) -> bool:
    try:
        look_up(name)
    except KeyError:
        return False
    return True


def _resolve(kind: str, name: str | None, look_up: Callable, number_of: Callable) -> int | None:
    if name is None:
        return None
    if name.isascii() and name.isdigit() and int(name) < _NO_ID:
        return int(name)
    try:
        return number_of(look_up(name))
    except KeyError:
        raise SetupError(f"Error resolving {kind}; {kind}='{name}'; {_MAKE_USER}, or name another with --{kind}"
                         ) from None


def _name_of(uid: int | None) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name if uid is not None else None
    except KeyError:
        return None


def drop(wanted: Privileges) -> None:
    """Become what was prepared.  Raises SetupError."""
    step = "chroot"
    was_root = os.geteuid() == 0
    try:
        for encoding in _LATE_ENCODINGS:             # the interpreter may be out of reach afterwards
            codecs.lookup(encoding)
        if wanted.root is not None:
            os.chroot(wanted.root)
            os.chdir("/")
        if wanted.capabilities is not None:
            capabilities.keep_over_setuid()
        step = "change group"
        if wanted.gid is not None:
            os.setresgid(wanted.gid, wanted.gid, wanted.gid)
        step = "change supplementary groups"
        _set_groups(wanted, was_root)
        step = "change user"
        if wanted.uid is not None:
            os.setresuid(wanted.uid, wanted.uid, wanted.uid)
    except OSError as problem:
        raise SetupError(f"Cannot {step}; error='{problem.strerror}'") from None
    if wanted.capabilities is not None:
        _limit(wanted.capabilities)
    if wanted.core_dumps:
        capabilities.permit_core_dumps()         # last: every step before forbids them again


def _set_groups(wanted: Privileges, was_root: bool) -> None:
    if not was_root or wanted.uid is None:
        return
    if wanted.gid is not None and wanted.user_name is not None:
        os.initgroups(wanted.user_name, wanted.gid)
    else:
        os.setgroups([])


def _limit(wanted: int) -> None:
    try:
        left = capabilities.limit(wanted)
    except OSError as problem:
        log(None, "core.error", 2, "Cannot limit capabilities; error='%s'", (problem.strerror,))
        return
    for number, feature in _LOST_FEATURE.items():
        if wanted & ~left & 1 << number:
            log(None, "core.caps", 3, "Capability is missing; capability='%s', lost='%s'",
                (capabilities.names_of(1 << number)[0], feature))


def give_up(unused: int) -> None:
    """Let go of capabilities that the loaded policy does not use, and of all ways to gain any."""
    capabilities.forbid_new_privileges()
    left = capabilities.permitted() & ~unused
    capabilities.limit(left)
    log(None, "core.caps", 6, "Capabilities kept; capabilities='%s'", (",".join(capabilities.names_of(left)),))


def raise_descriptor_limit(wanted: int) -> str | None:
    """Set the limit of descriptors; return the complaint when the system refuses, after raising what it allows."""
    if not wanted:
        return None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (OSError, ValueError) as problem:
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        text = getattr(problem, "strerror", None) or "Operation not permitted"
        return (f"Error setting file number limit; limit='{wanted}', error='{text}', used='{hard}', to have more, "
                "raise the hard limit (LimitNOFILE= of the unit, ulimit -Hn)")
    return None


def allow_core_dumps(directory: str) -> str | None:
    """Lift the limit on core files; return the complaint when they could not be written there."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    if os.access(directory, os.W_OK):
        return None
    return ("Unable to write to current directory, core dumps will not be generated; "
            f"dir='{directory}', error='Permission denied'")
