"""The module that old policies import their address blocks from.

`InetDomain` and `Inet6Domain` are defined in Zorp.Subnet; comparison, membership and missing
text are described there.  AbstractDomain is the base of every subnet.
"""

from __future__ import annotations

from Zorp.Subnet import Inet6Domain, InetDomain, Subnet

AbstractDomain = Subnet

__all__ = ["AbstractDomain", "Inet6Domain", "InetDomain"]
