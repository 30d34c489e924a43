"""Fixtures for tests of policy modules."""

import pytest

from test.support.dispatching import dispatching, echo_server

__all__ = ["dispatching", "echo_server", "untracked"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    """Connections say themselves where they go, often to made-up addresses: what the host tracks is no part of it."""
    monkeypatch.setattr("Zorp.acceptance.dispatch_table.original_destination", lambda sock, family: None)
