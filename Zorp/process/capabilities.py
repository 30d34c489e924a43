"""Linux capabilities through the C library: read, set, and read their text form.

Theory of operation
    Sets are integers, bit n for capability n, as in <linux/capability.h>.  parse() reads the
    text of cap_from_text(3), the form of --caps: clauses like `cap_net_raw,cap_net_admin=ip`.
    limit() leaves a process with given sets and nothing else, in the permitted, effective,
    inheritable, bounding and ambient sets.

    The kernel keeps capabilities per thread; so limit() belongs before the first thread.  A thread
    that is about to start a foreign program, and nothing else, gives up everything by itself:
    without_privileges().

The original kept the effective set empty and raised single capabilities around calls.  Here the
effective set holds what is left after the policy is loaded: a policy that forges addresses
needs its capability on every connection, and two calls per connection would protect nothing
that runs in the same process.
"""

from __future__ import annotations

import ctypes
import os
import re

CAP_SETPCAP = 8
CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13

_NAMES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)
ALL = (1 << len(_NAMES)) - 1
_VERSION_3 = 0x20080522
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CLAUSE = re.compile(r"(?P<names>[A-Za-z0-9_,]*)(?P<actions>([=+-][eip]*)+)$")

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def parse(text: str) -> int:
    """Return the capabilities that a text names, in whichever set.  Raises ValueError."""
    found = 0
    for clause in text.split():
        match = _CLAUSE.match(clause)
        if match is None:
            raise ValueError(f"clause '{clause}' is not of the form cap_name=flags")
        named = _names_to_bits(match["names"])
        for operator, flags in re.findall(r"([=+-])([eip]*)", match["actions"]):
            if operator != "+":
                found &= ~named
            if operator != "-" and flags:
                found |= named
    return found


def _names_to_bits(names: str) -> int:
    if names in ("", "all"):
        return ALL
    bits = 0
    for name in names.lower().split(","):
        try:
            bits |= 1 << _NAMES.index(name.removeprefix("cap_"))
        except ValueError:
            raise ValueError(f"no capability is called '{name}'") from None
    return bits


def names_of(bits: int) -> list[str]:
    """Return the names of the capabilities in a set."""
    return [f"cap_{name}" for number, name in enumerate(_NAMES) if bits >> number & 1]


def permitted() -> int:
    """Return the permitted set of this thread.  Raises OSError."""
    data = (_Data * 2)()
    _check(_libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), data))
    return data[0].permitted | data[1].permitted << 32


def limit(wanted: int) -> int:
    """Keep what is wanted of what there is, in every set; return what is left.  Raises OSError."""
    have = permitted()
    if have >> CAP_SETPCAP & 1:
        for number in range(len(_NAMES)):
            if not wanted >> number & 1:
                _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    left = have & wanted
    data = (_Data * 2)()
    for index in (0, 1):
        word = left >> (32 * index) & 0xFFFFFFFF
        data[index].effective = data[index].permitted = word
    _check(_libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), data))
    return left


def keep_over_setuid() -> None:
    """Let the permitted set survive the change from user 0 to another."""
    _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)


def permit_core_dumps() -> None:
    """Let the kernel write core files of this process, which a change of user forbids; its children inherit that."""
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def forbid_new_privileges() -> None:
    """From now on no program that is executed gains privileges, set-user-id or not."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def without_privileges() -> None:
    """Take everything from the calling thread, for good, also what user 0 would get back by executing a program.

    Raises OSError.  What the thread starts from now on has no capability and cannot gain one.
    """
    forbid_new_privileges()
    if permitted():
        _check(_libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), (_Data * 2)()))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
