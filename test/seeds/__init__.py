"""The statements of the five papers that this release answers, each by a test that names its number.

S000 "Establishing server connections", S001 "Accepting incoming connections", S002 "Reverse
proxy", S003 "Module Chainer", S004 "Minimal configuration, KZorp".  A test says
covers("S000-4"); a statement that cannot be tested yet stands in LATER with the reason;
test_coverage.py holds both to the numbers there are.
"""

from __future__ import annotations

import pathlib

POLICIES = pathlib.Path(__file__).parents[1] / "data" / "policies"

STATEMENTS = {"S000": 36, "S001": 42, "S002": 17, "S003": 36, "S004": 29}

LATER = {
    "S000-2": "POP3 and FTP proxies are not built",
    "S000-3": "the HTTP proxy is not built",
    "S000-7": "the HTTP proxy is not built",
    "S004-19": "the FTP proxy is not built",
}


def covers(*numbers):
    """Say which statements a test holds the program to."""
    def mark(test):
        test.statements = numbers
        return test
    return mark
