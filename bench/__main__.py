"""Run the measurements, print tables, keep the results."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

MEASUREMENTS = ("decision", "packetrules", "smtp", "plug", "startup", "idle")
RESULTS = Path(__file__).parent / "results"


def table(rows: list[dict]) -> str:
    """Return rows of any columns as aligned text."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
             for line in (columns, ["-" * width for width in widths], *cells)]
    return "\n".join(lines)


def host() -> dict:
    """Return what the figures depend on: processor, kernel, versions."""
    haproxy = subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), "unknown")
    return {"processor": model, "kernel": platform.release(), "python": platform.python_version(), "haproxy": haproxy}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="run just this measurement")
    chosen = parser.parse_args().only or MEASUREMENTS
    now = datetime.now(timezone.utc)
    report = {"date": now.isoformat(timespec="seconds"), "host": host(), "results": {}}
    print(json.dumps(report["host"]))
    for name in chosen:
        rows = importlib.import_module(f"bench.{name}").run()
        report["results"][name] = rows
        print(f"\n{name}\n{table(rows)}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    missed = [f"{name}: {row}" for name, rows in report["results"].items() for row in rows if row.get("met") is False]
    print(f"\nkept in {path}\n" + ("".join(f"goal missed: {line}\n" for line in missed) or "all goals met"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
