"""From the binds of a policy to the sockets a worker asks for.

A DBSockAddr is one socket.  A DBIface is one per address of the interface, a DBIfaceGroup one
per address of every interface in the group; addresses that come and go later are followed by
the worker's loop (Zorp.runtime.interfaces).
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

from Zorp.Constants import ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.runtime.listeners import ListenSpec


def listen_specs(chains) -> Iterator[tuple[object, list[ListenSpec]]]:
    """Yield each chain with what has to be opened for it, in the order of registration."""
    ordinals: collections.Counter = collections.Counter()
    for chain in chains:
        yield chain, [_numbered(spec, ordinals) for spec in _specs_of(chain)]


def _specs_of(chain) -> list[ListenSpec]:
    bind, params = chain.bind, chain.params
    protocol = bind.protocol or ZD_PROTO_TCP
    host, port = bind.sa.to_sockaddr()[:2]
    return [ListenSpec(
        protocol=protocol, family=bind.sa.family, address=host, port=port,
        backlog=params.backlog if protocol != ZD_PROTO_UDP else 0,
        rcvbuf_bytes=params.rcvbuf_bytes if protocol == ZD_PROTO_UDP else 65_536,
        transparent=bool(params.transparent or params.mark_tproxy))]


def _numbered(spec: ListenSpec, ordinals: collections.Counter) -> ListenSpec:
    """Tell several binds to port 0 of one address apart."""
    if spec.port:
        return spec
    ordinal = ordinals[spec.key]
    ordinals[spec.key] += 1
    return ListenSpec(**{name: getattr(spec, name) for name in spec.__slots__} | {"ordinal": ordinal})
