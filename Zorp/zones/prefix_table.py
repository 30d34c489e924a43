"""Longest prefix match: from an address to what was said about the narrowest net that holds it.

Theory of operation
    The nets cut the address space into intervals that each belong to one net, the narrowest.
    `_starts` holds where each interval begins, `_owners` which value owns it, so a look-up is a
    search for the last start that is not above the address.  Searching 200 000 starts costs
    eighteen probes of memory that no cache holds; therefore `_slots` cuts the range in which
    starts lie into equal pieces, a quarter as many as there are starts, and says for each piece
    which few starts to search.  A look-up then costs nearly the same for a hundred nets and for
    a hundred thousand, unless they crowd in one small piece of a wide range, where it degrades
    to the plain binary search.

    Starts are packed into arrays, because neighbours then share cache lines.  An IPv6 start is
    kept as two words: the search uses the upper one, and the lower one decides among the starts
    inside one /64.

Guarantees
    A table never changes after it is built; any thread may ask.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping

_STARTS_PER_SLOT = 4             # on average; fewer need more memory, and that costs more than a step of the search
_MAX_SLOT_BITS = 20              # 4 MiB of slots

Net = tuple[int, int]            # network as a host order integer without host bits, prefix length


def mask_of(bits: int, width: int) -> int:
    """Return the netmask of a prefix length as an integer of `width` bits (32 or 128)."""
    return ((1 << bits) - 1) << (width - bits)


def nested(nets: Iterable[Net], width: int) -> Iterator[tuple[Net, Net | None]]:
    """Yield each net with the narrowest other net around it (None: none), outer nets first."""
    around: list[Net] = []
    for net in sorted(nets):
        while around and net[0] & mask_of(around[-1][1], width) != around[-1][0]:
            around.pop()
        yield net, around[-1] if around else None
        around.append(net)


def _smallest_type(values: int) -> str:
    """Return the array type whose elements count that many values: small tables stay in the caches."""
    return "B" if values <= 1 << 8 else "H" if values <= 1 << 16 else "I"


_LOWER = (1 << 64) - 1


def prefix_table(nets: Mapping[Net, object], width: int) -> PrefixTable:
    """Return the table of `nets`, (network, prefix length) to value; `width` is 32 or 128 bits."""
    return PrefixTable(nets) if width == 32 else WidePrefixTable(nets)


class PrefixTable:
    """IPv4 nets, each with a value; immutable."""

    __slots__ = ("_base", "_owners", "_shift", "_slot_count", "_slots", "_starts", "_values")
    width = 32

    def __init__(self, nets: Mapping[Net, object]) -> None:
        """Build from `nets`: (network, prefix length) to value."""
        self._values: list[object] = [None]
        starts, owners = self._intervals(nets)
        self._owners = array(_smallest_type(len(self._values)), owners)
        self._pack(starts)

    def _intervals(self, nets: Mapping[Net, object]) -> tuple[list[int], list[int]]:
        """Return where each interval begins and the index of its value (0: no net)."""
        starts, owners = [0], [0]
        open_nets: list[tuple[int, int]] = []           # (first address after the net, index of its value)
        indexes: dict[int, int] = {}                    # identity of a value -> its index
        space = 1 << self.width

        def begin(start: int, owner: int) -> None:
            if starts[-1] == start:
                owners[-1] = owner
            elif owners[-1] != owner:
                starts.append(start)
                owners.append(owner)

        def close_until(address: int) -> None:
            while open_nets and open_nets[-1][0] <= address:
                end, _ = open_nets.pop()
                if end < space:
                    begin(end, open_nets[-1][1] if open_nets else 0)

        for network, bits in sorted(nets):
            close_until(network)
            value = nets[network, bits]
            index = indexes.setdefault(id(value), len(self._values))
            if index == len(self._values):
                self._values.append(value)
            open_nets.append((network + (1 << (self.width - bits)), index))
            begin(network, index)
        close_until(space)
        return starts, owners

    def _pack(self, starts: list[int]) -> None:
        self._starts = array("I", starts)
        self._cut_into_slots(starts)

    def _cut_into_slots(self, starts: list[int]) -> None:
        """Cut the range that holds starts into equal slots; each knows which starts lie in it."""
        self._base = starts[1] if len(starts) > 1 else 0
        span = starts[-1] - self._base
        slot_bits = min(max(len(starts) // _STARTS_PER_SLOT, 1).bit_length(), _MAX_SLOT_BITS)
        self._shift = max(span.bit_length() - slot_bits, 0)
        self._slot_count = (span >> self._shift) + 1
        index = 0
        slots = array("I")
        for slot in range(self._slot_count + 1):
            address = self._base + (slot << self._shift)
            while index < len(starts) and starts[index] < address:
                index += 1
            slots.append(index)
        self._slots = slots

    def lookup(self, address: int):
        """Return the value of the narrowest net around a host order integer; None: no net holds it."""
        slot = (address - self._base) >> self._shift
        if slot < 0:
            return self._values[self._owners[0]]
        if slot >= self._slot_count:
            return self._values[self._owners[-1]]
        slots = self._slots
        index = bisect_right(self._starts, address, slots[slot], slots[slot + 1])
        return self._values[self._owners[index - 1]]


class WidePrefixTable(PrefixTable):
    """IPv6 nets, each with a value; immutable."""

    __slots__ = ("_lower_starts",)
    width = 128

    def _pack(self, starts: list[int]) -> None:
        self._starts = array("Q", (start >> 64 for start in starts))
        self._lower_starts = array("Q", (start & _LOWER for start in starts))
        self._cut_into_slots(starts)

    def lookup(self, address: int):
        """Return the value of the narrowest net around a host order integer; None: no net holds it."""
        slot = (address - self._base) >> self._shift
        if slot < 0:
            return self._values[self._owners[0]]
        if slot >= self._slot_count:
            return self._values[self._owners[-1]]
        first, end, upper, starts = self._slots[slot], self._slots[slot + 1], address >> 64, self._starts
        index = bisect_right(starts, upper, first, end)
        if index > first and starts[index - 1] == upper:
            index = bisect_right(self._lower_starts, address & _LOWER, bisect_left(starts, upper, first, index), index)
        return self._values[self._owners[index - 1]]
