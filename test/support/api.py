"""The API of the original releases as data: loading it and finding one's way in it.

Schema: test/data/api/README.md.  Everything here is about the data; nothing imports Zorp.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "api"
OPEN_LIST = DATA / "open.txt"

RELEASES = ("3.9.0", "3.9.8", "5.0.0", "6.0.11", "7.0.4", "7.0.7")


@functools.cache
def load(module):
    """Return the facts about one policy module, `Zone` for Zorp.Zone."""
    return json.loads((DATA / f"{module}.json").read_text(encoding="ascii"))


def modules():
    """Return the names of all policy modules that the data describes, sorted."""
    return sorted(path.stem for path in DATA.glob("*.json") if path.stem != "_core")


def newest(variants):
    """Return the variant of the latest release among them."""
    return max(variants, key=lambda variant: max(map(RELEASES.index, variant["versions"])))


def exported(variants):
    """Return the names that any release re-exported, sorted."""
    return sorted({name for variant in variants for name in variant["names"]})


def open_checks():
    """Return {check: reason} of the checks that may fail, in the order of the file."""
    found = {}
    for number, line in enumerate(OPEN_LIST.read_text(encoding="ascii").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        check, separator, reason = line.partition(" | ")
        if not separator or not reason.strip():
            raise ValueError(f"{OPEN_LIST.name}:{number}: no reason given; write 'check | reason'")
        if check in found:
            raise ValueError(f"{OPEN_LIST.name}:{number}: listed twice: {check}")
        found[check] = reason.strip()
    return found
