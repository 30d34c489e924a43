"""`python -m test.api.report [MODULE...]`: how much of the old releases' API is there.

One line per module and kind of fact: present / total.  With module names: also every fact that
does not hold, and why; those in test/data/api/open.txt are marked with a star.
"""

from __future__ import annotations

import sys
from collections import Counter

from test.api import gate, walk
from test.support import api


def figures(module):
    """Return (total per kind, missing per kind, {check: problem}) of one module."""
    every = gate.checks(module)
    missing = {str(check): (check.kind, problem) for check in every if (problem := check.problem()) is not None}
    return (Counter(check.kind for check in every), Counter(kind for kind, _ in missing.values()),
            {text: problem for text, (_, problem) in missing.items()})


def main(names):
    """Print the table and, for modules named, their failures."""
    known_open = api.open_checks()
    sums, lacks = Counter(), Counter()
    print(f"{'module':15}" + "".join(f"{kind:>11}" for kind in walk.KINDS) + f"{'all':>11}")
    for module in names or gate.BUILT:
        total, missing, problems = figures(module)
        sums.update(total)
        lacks.update(missing)
        print(_line(module, total, missing))
        for text, problem in problems.items() if names else ():
            print(f"  {'*' if text in known_open else ' '} {text}: {problem}")
    print(_line("all", sums, lacks))
    print(f"not built: {', '.join(sorted(gate.UNBUILT))}; open checks listed: {len(known_open)}")


def _line(title, total, missing):
    cells = [f"{total[kind] - missing[kind]}/{total[kind]}" if total[kind] else "" for kind in walk.KINDS]
    every = sum(total.values())
    cells.append(f"  {every - sum(missing.values())}/{every}")
    return f"{title:15}" + "".join(f"{cell:>11}" for cell in cells)


if __name__ == "__main__":
    main(sys.argv[1:])
