"""Targets that accept any bytes, and the runner that makes them up: see test.fuzz.run.

A target is a module with

    one_input(data: bytes) -> None    raises when the invariant is broken; that is a finding
    PIECES                            byte strings of the grammar, to build inputs from

The property tests in test/wire call the same one_input.  What either finds becomes a vector
with a name beside the parser's other vectors.
"""
