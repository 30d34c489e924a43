"""Our address sets in the kernel: made beside the old ones, which go when no rule uses them any more.

Theory of operation
    load() compares what the kernel holds with the plan.  A set that is new is made and filled.  One
    that has other members under its name (see Zorp.netfilter.zonesets for those few) is built
    under a temporary name and swapped with the old one in one step; packet rules that name it
    see the old content or the new.  What was swapped out is kept until finish() removes it, so
    that undo() can swap it back when the rules cannot be loaded.

    finish() also removes the sets that the plan has not.  The kernel refuses that as long as a
    rule uses a set, and frees the rules of a table a moment after they were replaced: refusals are
    tried again for a second.  What is in use then is used by a rule of the site; it stays
    as it is, and is told to the caller, who may try again at the next load.

    Sets are made, swapped and removed through pyroute2.  Filling and listing speak netlink
    themselves: pyroute2 sends one message per member, the kernel takes hundreds in one, exceptions
    (nomatch) have no place in pyroute2's interface, and it takes a second to read 1900 sets.

Only sets whose names begin with "zorp." are touched.  Errors: SetError.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator

from pyroute2.ipset import IPSet
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.ipset import IPSET_FLAG_NOMATCH

from Zorp.netfilter.netlink import DUMP, HEADER, NetfilterSocket, attribute, attributes
from Zorp.netfilter.plan import SET_PREFIX, AddressSet, Member

_TYPE = "hash:net"
TEMPORARY = f"{SET_PREFIX}~"            # no set of a plan is called so: set_name() puts a letter or digit there
_LEAST_MAXELEM = 65_536
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/ipset/ip_set.h
_NETLINK_NETFILTER = 12
_ADD = 6 << 8 | 9                        # subsystem ipset, command add
_REQUEST_ACK = 0x1 | 0x4
_LIST = 6 << 8 | 7
_NAMES_ONLY, _HEADERS_ONLY = 1 << 1, 1 << 2
_ATTR_PROTOCOL, _ATTR_SETNAME, _ATTR_FAMILY, _ATTR_FLAGS, _ATTR_DATA, _ATTR_ADT, _ATTR_LINENO = 1, 2, 5, 6, 7, 8, 9
_ATTR_IP, _ATTR_CIDR, _ATTR_CADT_FLAGS, _ATTR_REFERENCES = 1, 3, 8, 25
_NESTED, _NET_BYTEORDER = 0x8000, 0x4000
_IPSET_PROTOCOL = 6
_IN_USE = 4100                           # an error code of ipset's own
_PROTOCOL = bytes((_IPSET_PROTOCOL,))
_GENERAL = bytes(4)                      # of every message: family, version, resource
_WIDTH = {4: 32, 6: 128}
_MEMBERS_PER_MESSAGE = 400               # of about 40 bytes each: an attribute holds at most 64 KiB
_RELEASE_S, _POLL_S = 1.0, 0.02          # how long the kernel may take to free the rules that it no longer has


class SetError(Exception):
    """A set could not be read or changed; `str()` is for the administrator."""


class Sets:
    """The sets of this network namespace; a context manager.  One thread only."""

    def __init__(self) -> None:
        try:
            self._ipset = IPSet()
        except (OSError, NetlinkError) as problem:
            raise SetError(f"ipset cannot be used: {problem}; load the module ip_set, as root") from None
        self._swapped: list[tuple[str, str]] = []        # (name, temporary name that has the old content)
        self._created: list[str] = []

    def __enter__(self) -> Sets:
        return self

    def __exit__(self, *exc_info) -> None:
        self._ipset.close()

    # ---- reading

    def names(self) -> list[str]:
        """Return the names of our sets, temporary ones included."""
        return sorted({name for name, _ in self._listed(_number(_ATTR_FLAGS, _NAMES_ONLY))})

    def used(self) -> set[str]:
        """Return the names of our sets that packet rules use, anybody's."""
        return {name for name, said in self._listed(_number(_ATTR_FLAGS, _HEADERS_ONLY))
                if any(dict(attributes(said.get(_ATTR_DATA, b""), 0)).get(_ATTR_REFERENCES, b""))}

    def read(self) -> dict[str, AddressSet]:
        """Return our sets with their members, without temporary ones."""
        found: dict[str, list] = {}
        for name, said in self._listed():
            if not name.startswith(TEMPORARY):
                if name not in found:            # the messages that continue a long set say no family
                    found[name] = [6 if said.get(_ATTR_FAMILY) == bytes((socket.AF_INET6,)) else 4, []]
                family, members = found[name]
                members.extend(_members(said.get(_ATTR_ADT, b""), family))
        return {name: AddressSet(name, family, tuple(sorted(members, key=lambda member: (member.net, member.nomatch))))
                for name, (family, members) in found.items()}

    @staticmethod
    def _listed(more: bytes = b"") -> Iterator[tuple[str, dict[int, bytes]]]:
        """Yield (name, attributes) of each message about a set of ours; `more`: further attributes of the request."""
        try:
            with NetfilterSocket() as netlink:
                for _, message in netlink.request(_LIST, DUMP, _GENERAL + attribute(_ATTR_PROTOCOL, _PROTOCOL) + more):
                    said = dict(attributes(message, HEADER.size + len(_GENERAL)))
                    name = said.get(_ATTR_SETNAME, b"").rstrip(b"\0").decode("utf-8", "replace")
                    if name.startswith(SET_PREFIX):
                        yield name, said
        except OSError as problem:
            raise SetError(f"listing sets: {problem.strerror or problem}") from None

    # ---- changing

    def load(self, wanted: Iterable[AddressSet]) -> bool:
        """Give the kernel these sets; return whether anything changed.  Raises SetError, after undo()."""
        self._remove_leftovers()
        present = self.read()
        try:
            for members in wanted:
                old = present.get(members.name)
                if old is None:
                    self._make(members.name, members)
                    self._created.append(members.name)
                elif old.family != members.family:
                    raise SetError(f"set {members.name} exists for the other family; destroy it")
                elif _content(old) != _content(members):
                    self._exchange(members)
        except SetError:
            self.undo()
            raise
        return bool(self._created or self._swapped)

    def undo(self) -> None:
        """Put the old contents back, after a load() whose rules were refused."""
        for name, temporary in reversed(self._swapped):
            self._call(f"swapping set {name}", self._ipset.swap, name, temporary)
        self._remove([*self._created, *(temporary for _, temporary in self._swapped)])
        self._swapped, self._created = [], []

    def finish(self, keep: Iterable[str] | None = None) -> list[str]:
        """Remove what was swapped out; with `keep`, also our sets that are not among these.

        Return what could not be removed, a text each: rules of the site use it.  Raises SetError
        when sets cannot be listed.
        """
        unwanted = {temporary for _, temporary in self._swapped}
        self._swapped, self._created = [], []
        if keep is not None:
            unwanted |= set(self.names()) - set(keep)
        return self._remove(sorted(unwanted))

    def _remove(self, names: Iterable[str]) -> list[str]:
        """Remove sets; return what could not be removed, a text each."""
        deadline = time.monotonic() + _RELEASE_S
        while True:
            refused = {name: problem for name in names if (problem := self._refusal(name))}
            if not refused or time.monotonic() > deadline:
                return list(refused.values())
            names = list(refused)
            time.sleep(_POLL_S)

    def _refusal(self, name: str) -> str:
        """Remove a set; return why it cannot be, empty: it is gone."""
        try:
            self._destroy(name)
        except SetError as problem:
            return str(problem)
        return ""

    def _exchange(self, members: AddressSet) -> None:
        temporary = TEMPORARY + hashlib.sha256(members.name.encode()).hexdigest()[:16]
        self._make(temporary, members)
        self._call(f"swapping set {members.name}", self._ipset.swap, members.name, temporary)
        self._swapped.append((members.name, temporary))

    def _make(self, name: str, members: AddressSet) -> None:
        size = max(_LEAST_MAXELEM, 2 * len(members.members))
        self._call(f"making set {name}", self._ipset.create, name, stype=_TYPE, family=_FAMILY[members.family],
                   maxelem=size)
        try:
            _fill(name, members)
        except OSError as problem:
            self._destroy(name)
            raise SetError(f"filling set {name}: {problem.strerror}") from None

    def _remove_leftovers(self) -> None:
        """Remove temporary sets that a program left behind when it was killed."""
        for name in self.names():
            if name.startswith(TEMPORARY):
                self._destroy(name)

    def _destroy(self, name: str) -> None:
        self._call(f"removing set {name}", self._ipset.destroy, name)

    @staticmethod
    def _call(what: str, function, *arguments, **keywords):
        try:
            return list(function(*arguments, **keywords) or ())
        except NetlinkError as problem:
            raise SetError(f"{what}: {'a packet rule uses it' if problem.code == _IN_USE else problem}") from None
        except OSError as problem:
            raise SetError(f"{what}: {problem}") from None


def _content(members: AddressSet) -> frozenset[Member]:
    return frozenset(members.members)


def _members(entries: bytes, family: int) -> Iterator[Member]:
    """Yield the members in a list of entries; raises nothing for what the kernel does not say."""
    for _, entry in attributes(entries, 0):
        said = dict(attributes(entry, 0))
        address = next((value for _, value in attributes(said.get(_ATTR_IP, b""), 0)), bytes(_WIDTH[family] // 8))
        bits = said[_ATTR_CIDR][0] if _ATTR_CIDR in said else _WIDTH[family]
        flags = int.from_bytes(said.get(_ATTR_CADT_FLAGS, b""), "big")
        yield Member(f"{socket.inet_ntop(_FAMILY[family], address)}/{bits}", bool(flags & IPSET_FLAG_NOMATCH))


# ---------------------------------------------------------------------------- filling

def _fill(name: str, members: AddressSet) -> None:
    """Add all members to a set; raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        for first in range(0, len(members.members), _MEMBERS_PER_MESSAGE):
            netlink.send(_add_message(name, members, first))
            _take_answer(netlink.recv(65_536))


def _add_message(name: str, members: AddressSet, first: int) -> bytes:
    entries = b"".join(_nested(_ATTR_DATA, _entry(member, members.family) + _number(_ATTR_LINENO, first + place))
                       for place, member in enumerate(members.members[first:first + _MEMBERS_PER_MESSAGE]))
    body = struct.pack("=BBH", _FAMILY[members.family], 0, 0) + \
        _attr(_ATTR_PROTOCOL, bytes((_IPSET_PROTOCOL,))) + _attr(_ATTR_SETNAME, name.encode() + b"\0") + \
        _number(_ATTR_LINENO, 0) + _nested(_ATTR_ADT, entries)
    return struct.pack("=IHHII", 16 + len(body), _ADD, _REQUEST_ACK, 1, 0) + body


def _entry(member: Member, family: int) -> bytes:
    net = ipaddress.ip_network(member.net)
    address = _attr(_NET_BYTEORDER | (1 if family == 4 else 2), net.network_address.packed)
    flags = _number(_ATTR_CADT_FLAGS, IPSET_FLAG_NOMATCH) if member.nomatch else b""
    return _nested(_ATTR_IP, address) + _attr(_ATTR_CIDR, bytes((net.prefixlen,))) + flags


def _attr(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _nested(kind: int, value: bytes) -> bytes:
    return _attr(kind | _NESTED, value)


def _number(kind: int, value: int) -> bytes:
    return _attr(kind | _NET_BYTEORDER, struct.pack("!I", value))


def _take_answer(answer: bytes) -> None:
    """Raise OSError when the kernel refused; codes above 4095 are ipset's own."""
    error, = struct.unpack_from("=i", answer, 16)
    if error:
        raise OSError(-error, os.strerror(-error) if -error < 4096 else f"ipset error {-error}")
