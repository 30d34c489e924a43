"""Where a policy says who inspects content besides the proxies themselves.

    StackingProvider(name="antivirus", backend=RemoteStackingBackend((SockAddrInet("10.0.0.9", 1318),)))

A provider gives a backend a name; stacking tables then refer to the name.  The remote backend of
the original spoke a protocol that was never published, so using it is an error, as in every GPL
release: asking it to stack raises PolicyError.

Providers are registered while the policy loads and only read later.
"""

from __future__ import annotations

from Zorp import Globals
from Zorp.Constants import CORE_POLICY
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.Log import log


class AbstractStackingBackend:
    """What a stacking backend offers."""

    def __init__(self):
        pass

    def stack(self, stack_info=None):
        """Return (client stream, server stream[, control stream]) or None; every backend has its own."""
        raise OSError("Unimplemented stacking method")


class RemoteStackingBackend(AbstractStackingBackend):
    """Content inspection on other hosts, `addrs` a sequence of SockAddr."""

    def __init__(self, addrs):
        super().__init__()
        self.addrs = addrs
        self.current_host = 0

    def stack(self, stack_info=None):
        """Raises PolicyError: the remote protocol does not exist outside the commercial product."""
        raise PolicyError("Unsupported stacking method; method='3'",
                          remedy="stack a proxy or a program on this host instead")


class StackingProvider:
    """A name for a backend.  Raises PolicyError when the name is taken."""

    def __init__(self, name, backend):
        arguments.name("StackingProvider", "name", name)
        if isinstance(backend, type) or not callable(getattr(backend, "stack", None)):
            raise arguments.invalid(f"StackingProvider '{name}'", "backend", backend, "give an object with stack()")
        if name in Globals.stacking_providers:
            raise PolicyError(f"Duplicate Stacking provider: {name}", remedy="give each provider a name of its own")
        self.name = name
        self.backend = backend
        Globals.stacking_providers[name] = self


def getStackingProviderBackend(name):
    """Return the backend of the provider with this name; None, and a line of log, when there is none."""
    if name in Globals.stacking_providers:
        return Globals.stacking_providers[name].backend
    log(None, CORE_POLICY, 3, "No such stacking provider; provider='%s'", (name,))
    return None
