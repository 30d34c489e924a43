"""What workers do in a revocation (Zorp.runtime.revocation): tell, judge and end sessions.

Sessions travel as plain lists: [key, service, arrival].  The key names one client connection:
secondary sessions share an id, and each is judged by itself.

Only judge() may run policy code; the worker's loop takes the other steps itself.
"""

from __future__ import annotations

from Zorp import Globals
from Zorp.acceptance.verdict import revoke
from Zorp.engine.builtin_proxy import running
from Zorp.runtime.decision import NOT_IP, Arrival, Refused, permit, service_for
from Zorp.transport.interfaces import incoming_interface


def live_sessions() -> list[list]:
    """Return the sessions of this worker, of which proxies run."""
    masters = {id(master): master for proxy in running.all() for master in (proxy.session.getMasterSession(),)}
    return [described(master, master.server_address) for master in masters.values()]


def described(master, server_address) -> list:
    """Return a session as it travels; its arrival is None when it cannot be described, and so not be judged.

    server_address: where it is, or wants to be, connected to; None: nowhere yet.
    """
    try:
        return [_key(master), master.service.name, list(_arrival(master, server_address))]
    except Exception:                            # it ends just now, or a site made it in its own way
        return [_key(master), "", None]


def _key(master) -> list:
    return [str(master.session_id), int(master.secondary_connection_id)]


def _arrival(master, server_address) -> Arrival:
    chain = next((chain for chain in Globals.dispatch_table.chains() if chain.bind is master.client_listen), None)
    by_rules = chain.params.rule_chain if chain is not None else master.rule_id is not None
    sock = getattr(master.client_stream, "sock", None)
    return Arrival(
        protocol=master.protocol, client=_address(master.client_address), destination=_address(master.client_local),
        iface=incoming_interface(sock) if sock is not None and sock.fileno() >= 0 else None,
        listener=None if by_rules else tuple(master.client_listen.key()),
        server=None if server_address is None else _address(server_address) or NOT_IP)


def _address(address) -> tuple[str, int] | None:
    return (address.ip_s, address.port) if hasattr(address, "ip_s") else None


def judge(sessions: list[list]) -> list[list]:
    """Return [key, reason] of those sessions that the policy of this worker would refuse."""
    refused = []
    for key, service_name, arrival in sessions:
        try:
            if arrival is None:
                raise Refused("it cannot be judged without its addresses")
            arrival = Arrival(*arrival)
            service = service_for(arrival)
            if service.name != service_name:
                raise Refused(f"it would get the service {service.name}")
            permit(service, arrival)
        except Refused as reason:
            refused.append([key, str(reason)])
        except Exception as problem:             # ours or the policy's: what cannot be judged does not go on
            refused.append([key, f"it cannot be judged: {type(problem).__name__}"])
    return refused


def end_sessions(refused: list[list]) -> int:
    """End these sessions of this worker; return how many there still were."""
    reasons = {tuple(key): reason for key, reason in refused}
    ended = set()
    for proxy in running.all():
        master = proxy.session.getMasterSession()
        key = tuple(_key(master))
        if key in reasons and not proxy.stop_requested:      # else it is ending already
            if key not in ended:
                revoke(master, reasons[key])
                ended.add(key)
            proxy.request_stop()
    return len(ended)


STEPS = {"describe": lambda sessions: live_sessions(), "judge": judge, "end": end_sessions}
