"""Fixtures that every directory of tests may use."""

from test.support.daemon import zorp

__all__ = ["zorp"]
