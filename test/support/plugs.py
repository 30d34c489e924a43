"""A Plug with settings, and a first exchange through it.

    with serve(plug(shutdown_soft=TRUE)) as session:
        exchange(session)
"""

from __future__ import annotations

from Zorp.Plug import PlugProxy


def plug(base=PlugProxy, **settings):
    """Return a class that sets these attributes in config()."""

    class Configured(base):
        def config(self):
            super().config()
            for name, value in settings.items():
                setattr(self, name, value)

    return Configured


def stacking(form, **settings):
    """Return a Plug that stacks this; None: nothing."""
    return plug(stack_proxy=form, **settings)


def exchange(session) -> None:
    """One byte each way: from now on the proxy relays."""
    session.client.sendall(b"c")
    assert session.server.recv(1) == b"c"
    session.server.sendall(b"s")
    assert session.client.recv(1) == b"s"
