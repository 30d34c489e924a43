"""TCP listeners: dispatchers under the names that policies used up to release 6.

`bindto` may be a SockAddr, a bind object or a list of them; the protocol is always TCP, a bind
object that says otherwise is an error.  Everything else is as in Zorp.Dispatch.
"""

from __future__ import annotations

from Zorp.acceptance.bind_forms import convertSockAddrToDB
from Zorp.Constants import ZD_PROTO_TCP
from Zorp.Dispatch import CSZoneDispatcher, Dispatcher, ZoneDispatcher, _warn_deprecated

__all__ = ["CSZoneListener", "Listen", "Listener", "ZoneListener"]


class Listener(Dispatcher):
    """Listener(SockAddrInet('10.1.0.1', 50080), 'office_http'): one service for every connection."""

    deprecated_warning = True

    def __init__(self, bindto, service, **kw):
        _warn_deprecated(Listener, "Dispatcher")
        super().__init__(convertSockAddrToDB(bindto, ZD_PROTO_TCP), service, **kw)


class ZoneListener(ZoneDispatcher):
    """The service by the client's zone."""

    deprecated_warning = True

    def __init__(self, bindto, services, **kw):
        _warn_deprecated(ZoneListener, "Dispatcher")
        super().__init__(convertSockAddrToDB(bindto, ZD_PROTO_TCP), services, **kw)


class CSZoneListener(CSZoneDispatcher):
    """The service by the zones of client and server."""

    deprecated_warning = True

    def __init__(self, bindto, services, **kw):
        _warn_deprecated(CSZoneListener, "Dispatcher")
        super().__init__(convertSockAddrToDB(bindto, ZD_PROTO_TCP), services, **kw)


Listen = Listener            # the name of release 0.6
