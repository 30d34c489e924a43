"""Fixtures for tests of policy modules."""

from test.support.dispatching import dispatching, echo_server

__all__ = ["dispatching", "echo_server"]
