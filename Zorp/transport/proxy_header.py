"""The PROXY header of a load balancer, read from the front of an accepted connection.

The grammar is Zorp.wire.proxy_protocol.  The whole header has to arrive within five seconds,
before TLS and before any greeting is sent; what follows it is given back to the stream.
"""

from __future__ import annotations

import time

from Zorp.transport.stream import SocketStream
from Zorp.wire.errors import WireError
from Zorp.wire.proxy_protocol import Endpoint, parse

HEADER_TIMEOUT_S = 5.0


def read_source(stream: SocketStream) -> Endpoint | None:
    """Read the header; return the client it names as (address text, port), None when it names none.

    Raises WireError for bytes that are no header or end early, StreamTimeout when they do not
    come in time, another OSError when the connection fails.
    """
    deadline = time.monotonic() + HEADER_TIMEOUT_S
    received = b""
    while (header := parse(received)) is None:
        part = stream.recv(deadline=deadline)
        if not part:
            raise WireError("Connection closed inside the PROXY protocol header; data='%s'", received)
        received += part
    stream.unread(received[header.consumed:])
    return header.source
