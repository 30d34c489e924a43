"""What the instance of a loaded policy wants from the packet filter, as an InstanceDescription.

zorp --describe prints it (Zorp.runtime.check), a worker hands it to kzorpd.

The ports of rule listeners are those the policy fixes (config.options.rule_listen_port), else
those the instance had when it ran last, which it will have again; else 0, not known.
"""

from __future__ import annotations

import socket

from Zorp import Globals
from Zorp.Config import config
from Zorp.Constants import ZD_PROTO_UDP
from Zorp.Exceptions import PolicyError
from Zorp.Router import DirectedRouter
from Zorp.rules.description import (
    DenyData,
    ForwardData,
    InstanceDescription,
    ListenerData,
    NatData,
    ProxyData,
    ServiceData,
    ZoneData,
)
from Zorp.rules.engine import NetData
from Zorp.runtime.listeners import ListenSpec, PortStore, port_store_path
from Zorp.runtime.options import Options
from Zorp.Service import DenyIPv4, DenyIPv6, DenyService, PFService
from Zorp.zones.table import unmapped_net


def describe(options: Options) -> InstanceDescription:
    """Return the description of the policy that is loaded; raises PolicyError for what has no packet form."""
    return InstanceDescription(
        instance=options.instance,
        zones=tuple(map(_zone, sorted(Globals.zones.values(), key=lambda zone: zone.getDepth()))),
        services=tuple(map(_service, Globals.services.values())),
        rules=Globals.rules.data() if Globals.rules is not None and config.options.kzorp_enabled else (),
        listeners=_listeners(PortStore(port_store_path(options))),
    )


def _zone(zone) -> ZoneData:
    nets = dict.fromkeys(map(_net, zone.subnets))
    return ZoneData(name=zone.name, parent=zone.admin_parent.name if zone.admin_parent is not None else None,
                    nets=tuple(nets), hostnames=tuple(zone.hostnames))


def _net(subnet) -> NetData:
    family, network, bits = unmapped_net(subnet.family, subnet.network_int, subnet.mask_bits)
    return NetData(int(family), network, bits)


def _service(service) -> ServiceData:
    if isinstance(service, PFService):
        return ForwardData(name=service.name, router=_fixed_target(service), forge_addr=bool(service.router.forge_addr),
                           snat=_nat_entries(service, service.snat_policy),
                           dnat=_nat_entries(service, service.dnat_policy))
    if isinstance(service, DenyService):
        return DenyData(name=service.name, logging=bool(service.logging),
                        ipv4=DenyIPv4(service.ipv4_setting).name, ipv6=DenyIPv6(service.ipv6_setting).name)
    return ProxyData(name=service.name)


def _fixed_target(service) -> tuple[str, int] | None:
    if not isinstance(service.router, DirectedRouter):
        return None
    address = service.router.dest_addr[0]
    if address.family not in (socket.AF_INET, socket.AF_INET6):
        raise PolicyError(f"Invalid router type specified for port forwarded service; service='{service.name}'",
                          remedy="give the DirectedRouter of a PFService an IP address")
    return address.ip_s, address.port


def _nat_entries(service, policy) -> tuple[NatData, ...]:
    if policy is None:
        return ()
    try:
        mapping = policy.getKZorpMapping()
    except ValueError as problem:
        raise PolicyError(f"{problem}; service='{service.name}', policy='{policy.name}'",
                          remedy="write each mapping as (source, destination, translated)") from None
    return tuple(NatData(*map(_net, entry)) for entry in mapping)


def _listeners(ports: PortStore) -> tuple[ListenerData, ...]:
    listeners = []
    for chain in Globals.dispatch_table.chains():
        if not chain.params.rule_chain:
            continue
        address = chain.bind.sa
        port = address.port or ports.recall(ListenSpec(protocol=chain.protocol, family=int(address.family),
                                                       address=address.ip_s, port=0, transparent=True, lasting=True))
        protocol = socket.IPPROTO_UDP if chain.protocol == ZD_PROTO_UDP else socket.IPPROTO_TCP
        listeners.append(ListenerData(int(protocol), address.ip_s, port))
    return tuple(listeners)
