"""Feed made-up inputs to the fuzz targets and say how many were run.

    python -m test.fuzz.run --inputs 1000000                    all targets, evenly
    python -m test.fuzz.run --inputs 50000 --target smtp_body   one of them
    python -m test.fuzz.run --seed 7                            the same inputs again

Inputs are grammar pieces of the target strung together, damaged a little, and now and then
plain noise.  A finding is printed with the seed and the input that breaks the invariant and
ends the run with status 1.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import random
import sys
import time

import test.fuzz

LONGEST_INPUT_BYTES = 4096
_NOT_TARGETS = {"run"}


def target_names() -> list[str]:
    """Return the names of all fuzz targets, sorted."""
    found = pkgutil.iter_modules(test.fuzz.__path__)
    return sorted(module.name for module in found if module.name not in _NOT_TARGETS)


def made_up_input(dice: random.Random, pieces: list[bytes]) -> bytes:
    """Return one input."""
    if dice.random() < 0.05:
        return dice.randbytes(dice.randrange(64))
    data = bytearray(b"".join(dice.choices(pieces, k=dice.randrange(1, 12))))
    for _ in range(dice.choice((0, 0, 1, 1, 2, 4))):
        _damage(dice, data)
    return bytes(data[:LONGEST_INPUT_BYTES])


def _damage(dice: random.Random, data: bytearray) -> None:
    place = dice.randrange(len(data) + 1)
    kind = dice.randrange(5)
    if kind == 0:
        data[place:place] = dice.choice((b"\r", b"\n", b"\0", b".", b"\r\n", b"\xff", b"\xc3\xa9", b" ", b"\t"))
    elif kind == 1:
        del data[place:place + dice.randrange(1, 4)]
    elif kind == 2:
        data[place:place + 1] = bytes((dice.randrange(256),))
    elif kind == 3:
        data[place:place] = data[:dice.randrange(len(data) + 1)]
    else:
        data[place:place] = bytes((dice.randrange(32, 127),)) * dice.choice((2, 70, 300, 600))


def run(name: str, inputs: int, seed: int) -> None:
    """Run that many inputs; raises what the target raises, with the input as a note on stderr."""
    target = importlib.import_module(f"test.fuzz.{name}")
    dice = random.Random(f"{name}/{seed}")
    for _ in range(inputs):
        data = made_up_input(dice, target.PIECES)
        try:
            target.one_input(data)
        except BaseException:
            print(f"FINDING in {name}, seed {seed}: {data!r}", file=sys.stderr)
            raise


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m test.fuzz.run", description="run the fuzz targets")
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs in all (100000)")
    parser.add_argument("--target", action="append", choices=target_names(), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random numbers (the time)")
    options = parser.parse_args(arguments)
    names = options.target or target_names()
    began = time.monotonic()
    total = 0
    for name, count in zip(names, _shares(options.inputs, len(names)), strict=True):
        run(name, count, options.seed)
        total += count
        print(f"{name}: {count} inputs", flush=True)
    print(f"{total} inputs run in {time.monotonic() - began:.0f} s, seed {options.seed}, no finding")
    return 0


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


if __name__ == "__main__":
    sys.exit(main())
