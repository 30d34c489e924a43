"""The file of `kzorp --upload`: one zone per line.

    zone;parent;subnet,subnet,...        "#" begins a comment line; quotes around names are removed

An empty parent is a root, the list of subnets may be empty, a subnet is an address or
address/bits.  Parents must stand before their children.
"""

from __future__ import annotations

from collections.abc import Iterable

from Zorp.rules.description import (
    MAX_DEPTH,
    MAX_ZONES,
    DescriptionError,
    InstanceDescription,
    ZoneData,
    check,
    parse_net,
)

_MOST_LINE_CHARS = 1 << 20


class UploadError(ValueError):
    """The file cannot be used; `str()` is the text of the original, with the line."""


def read_zones(lines: Iterable[str]) -> tuple[ZoneData, ...]:
    """Return the zones of a file; raises UploadError."""
    zones: dict[str, ZoneData] = {}
    for line in lines:
        line = line.rstrip("\r\n")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            zone = _zone(line)
            if zone.name in zones:
                raise ValueError(f"zone '{zone.name}' given twice")
            if zone.parent is not None and zone.parent not in zones:
                raise ValueError(f"parent '{zone.parent}' is not a zone before it")
        except ValueError as problem:
            raise UploadError(f"Error while processing the following line: {line[:200]}\n{problem}") from None
        zones[zone.name] = zone
    try:
        check(InstanceDescription(instance="upload", zones=tuple(zones.values())))
    except DescriptionError as problem:
        raise UploadError(f"Error while processing the file; at most {MAX_ZONES} zones, {MAX_DEPTH} above each other\n"
                          f"{problem}") from None
    return tuple(zones.values())


def _zone(line: str) -> ZoneData:
    if len(line) > _MOST_LINE_CHARS:
        raise ValueError(f"more than {_MOST_LINE_CHARS} characters")
    fields = line.split(";")
    if len(fields) != 3:
        raise ValueError("three fields were expected: zone;parent;subnets")
    name, parent, subnets = (field.strip() for field in fields)
    name, parent = _unquoted(name), _unquoted(parent)
    if not name:
        raise ValueError("the zone has no name")
    nets = tuple(parse_net(subnet.strip()) for subnet in subnets.split(",") if subnet.strip())
    return ZoneData(name=name, parent=parent or None, nets=nets)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text
