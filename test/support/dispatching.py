"""Policies about dispatchers, in the test's own process: a common beginning and an echo server behind it."""

from __future__ import annotations

import pytest

from test.support.gateway import Gateway, Server

HEAD = """
from Zorp.Core import *
from Zorp.Plug import *

Zone("local", "127.0.0.0/8")
Zone("office", "10.0.0.0/8")
Zone("lab", "10.7.0.0/16", admin_parent="office")
Zone("internet", "0.0.0.0/0")

class Plug(PlugProxy):
    pass

def service(name, **values):
    return Service(name, Plug, router=DirectedRouter(SockAddrInet("127.0.0.1", $port)), **values)
"""


@pytest.fixture
def echo_server():
    """A server that gives back what it is sent."""
    with Server() as running:
        yield running


@pytest.fixture
def dispatching(echo_server):
    """Start a policy whose services connect to the echo server; policies begin with HEAD."""
    running = []

    def start(policy, **values):
        gateway = Gateway(HEAD + policy, port=echo_server.port, **values).__enter__()
        running.append(gateway)
        return gateway
    yield start
    for gateway in reversed(running):
        gateway.__exit__(None, None, None)
