"""What workers do in a revocation (Zorp.runtime.revocation): tell, judge and end sessions.

Sessions travel as plain lists: [id, service, arrival].
"""

from __future__ import annotations

from Zorp import Globals
from Zorp.acceptance.verdict import ABORTED_BY_POLICY_ACTION
from Zorp.engine.builtin_proxy import running
from Zorp.Log import log
from Zorp.runtime.decision import Arrival, Refused, permit, service_for
from Zorp.transport.interfaces import incoming_interface

_INFO = "revoked, the policy refuses it now"


def live_sessions() -> list[list]:
    """Return the sessions of this worker, of which proxies run."""
    masters = {id(master): master for proxy in running.all() for master in (proxy.session.getMasterSession(),)}
    return [[master.session_id, master.service.name, _described(master)] for master in masters.values()
            if master.service is not None]


def _described(master) -> list | None:
    """Return the arrival of a session as a list; None: it cannot be described, and so not be judged."""
    try:
        return list(_arrival(master))
    except (AttributeError, TypeError, OSError):     # the session ends just now, or a site made it in its own way
        return None


def _arrival(master) -> Arrival:
    chain = next((chain for chain in Globals.dispatch_table.chains() if chain.bind is master.client_listen), None)
    by_rules = chain.params.rule_chain if chain is not None else master.rule_id is not None
    sock = getattr(master.client_stream, "sock", None)
    return Arrival(
        protocol=master.protocol, client=_address(master.client_address), destination=_address(master.client_local),
        iface=incoming_interface(sock) if sock is not None and sock.fileno() >= 0 else None,
        listener=None if by_rules else tuple(master.client_listen.key()), server=_address(master.server_address))


def _address(address) -> tuple[str, int] | None:
    return (address.ip_s, address.port) if hasattr(address, "ip_s") else None


def judge(sessions: list[list]) -> list[list]:
    """Return [id, reason] of those sessions that the policy of this worker would refuse."""
    refused = []
    for session_id, service_name, described in sessions:
        try:
            if described is None:
                raise Refused("it cannot be judged without its addresses")
            arrival = Arrival(*described)
            service = service_for(arrival)
            if service.name != service_name:
                raise Refused(f"it would get the service {service.name}")
            permit(service, arrival)
        except Refused as reason:
            refused.append([session_id, str(reason)])
        except Exception as problem:             # ours or the policy's: what cannot be judged does not go on
            refused.append([session_id, f"it cannot be judged: {type(problem).__name__}"])
    return refused


def end_sessions(refused: list[list]) -> int:
    """End these sessions of this worker; return how many there still were."""
    ended = 0
    for session_id, reason in refused:
        if running.stop_session(session_id, f"{_INFO}: {reason}", ABORTED_BY_POLICY_ACTION):
            ended += 1
            log(session_id, "core.policy", 2, "Session revoked, the new policy refuses it; reason='%s'", (reason,))
    return ended


STEPS = {"describe": lambda sessions: live_sessions(), "judge": judge, "end": end_sessions}
