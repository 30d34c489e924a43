"""Measurements beside real peers, in one run: `make bench`, or `python -m bench --only smtp`.

Every measurement is a module with run(options) -> list of rows (dictionaries); this package
prints them as tables and keeps them as JSON under bench/results/.  CPU time is what the
measured process and its children used, from /proc, because it is steadier than wall time.
"""
