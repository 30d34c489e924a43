"""UDP receivers: dispatchers under the names that policies used up to release 6.

`bindto` may be a SockAddr, a bind object or a list of them; the protocol is always UDP, a bind
object that says otherwise is an error.  Everything else is as in Zorp.Dispatch.

A session is a pair of client and destination address, see Zorp.acceptance.datagram_sessions; Plug serves it.
"""

from __future__ import annotations

from Zorp.acceptance.bind_forms import convertSockAddrToDB
from Zorp.Constants import ZD_PROTO_UDP
from Zorp.Dispatch import CSZoneDispatcher, Dispatcher, ZoneDispatcher, _warn_deprecated

__all__ = ["CSZoneReceiver", "Receiver", "ZoneReceiver"]


class Receiver(Dispatcher):
    """Receiver(SockAddrInet('10.1.0.1', 50053), 'office_dns'): one service for every client."""

    deprecated_warning = True

    def __init__(self, bindto, service, **kw):
        _warn_deprecated(Receiver, "Dispatcher")
        super().__init__(convertSockAddrToDB(bindto, ZD_PROTO_UDP), service, **kw)


class ZoneReceiver(ZoneDispatcher):
    """The service by the client's zone."""

    deprecated_warning = True

    def __init__(self, bindto, services, **kw):
        _warn_deprecated(ZoneReceiver, "Dispatcher")
        super().__init__(convertSockAddrToDB(bindto, ZD_PROTO_UDP), services, **kw)


class CSZoneReceiver(CSZoneDispatcher):
    """The service by the zones of client and server."""

    deprecated_warning = True

    def __init__(self, bindto, services, **kw):
        _warn_deprecated(CSZoneReceiver, "Dispatcher")
        super().__init__(convertSockAddrToDB(bindto, ZD_PROTO_UDP), services, **kw)
