"""Fixtures of this directory."""

from test.support.host import host

__all__ = ["host"]
