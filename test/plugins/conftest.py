"""The host that zorpctl controls in these tests."""

from test.support.host import host

__all__ = ["host"]
