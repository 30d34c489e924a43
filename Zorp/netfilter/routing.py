"""Policy routing for diverted packets: the rule on their mark, and the table that keeps them here.

A rule or route is ours when it has our mark or stands in our table; others are left alone.  Both
families are looked at, also one that the site uses no longer, as far as the kernel has it.
Errors: RoutingError.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from Zorp.netfilter.plan import IpRule, Route
from Zorp.netfilter.site import Site

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_EVERYTHING = {4: "0.0.0.0/0", 6: "::/0"}
_RTN_LOCAL = 2
_MAIN = 254


class RoutingError(Exception):
    """A rule or route could not be read or changed; `str()` is for the administrator."""


class Routing:
    """The routing of this network namespace; a context manager.  One thread only."""

    def __init__(self) -> None:
        try:
            self._route = IPRoute()
            self._lo = self._route.link_lookup(ifname="lo")[0]
        except (OSError, NetlinkError, IndexError) as problem:
            raise RoutingError(f"routing cannot be asked for: {problem}") from None

    def __enter__(self) -> Routing:
        return self

    def __exit__(self, *exc_info) -> None:
        self._route.close()

    def rules(self, site: Site) -> list[IpRule]:
        """Return the rules on our mark, and those on other bits that lead to our table."""
        found = []
        for family in _FAMILY:
            for message in self._asked(family, site, self._route.get_rules):
                mark, table = message.get_attr("FRA_FWMARK") or 0, message.get_attr("FRA_TABLE")
                if mark & site.marks.divert or table == site.routing_table:
                    found.append(IpRule(family, message.get_attr("FRA_PRIORITY") or 0, mark,
                                        message.get_attr("FRA_FWMASK") or 0, table,
                                        message.get_attr("FRA_IIFNAME") or ""))
        return found

    def routes(self, site: Site) -> list[Route]:
        """Return our route per family, where it is there."""
        return [Route(family, site.routing_table) for family in _FAMILY
                if any(message["type"] == _RTN_LOCAL and message["dst_len"] == 0
                       and message.get_attr("RTA_OIF") == self._lo
                       for message in self._asked(family, site, self._route.get_routes, table=site.routing_table))]

    @staticmethod
    def _asked(family: int, site: Site, function, **keywords) -> list:
        """Return the answers about a family; none when a kernel without the family is asked about an unused one."""
        try:
            return list(function(family=_FAMILY[family], **keywords))
        except (NetlinkError, OSError) as problem:
            if family not in site.families:
                return []
            raise RoutingError(f"reading the routing of IPv{family}: {problem}") from None

    def load(self, rules: Iterable[IpRule], routes: Iterable[Route], site: Site) -> None:
        """Add what is missing, routes first."""
        present_routes, present = self.routes(site), self.rules(site)
        for route in routes:
            if route not in present_routes:
                self._call(str(route), self._route.route, "add", family=_FAMILY[route.family],
                           dst=_EVERYTHING[route.family], oif=self._lo, table=route.table, type="local", scope="host")
        for rule in rules:
            if rule not in present:
                self._change(rule, "add")

    def remove_others(self, rules: Collection[IpRule], routes: Collection[Route], site: Site) -> None:
        """Remove our rules and routes that are not among these."""
        for rule in self.rules(site):
            if rule not in rules and self._is_exactly_ours(rule, site):
                self._change(rule, "del")
        for route in self.routes(site):
            if route not in routes:
                self._call(f"remove {route}", self._route.route, "del", family=_FAMILY[route.family],
                           dst=_EVERYTHING[route.family], oif=self._lo, table=route.table, type="local", scope="host")

    @staticmethod
    def _is_exactly_ours(rule: IpRule, site: Site) -> bool:
        return rule.mark == rule.mask == site.marks.divert and rule.table in (site.routing_table, _MAIN)

    def _change(self, rule: IpRule, command: str) -> None:
        iface = {"iifname": rule.iface} if rule.iface else {}
        self._call(f"{command} {rule}", self._route.rule, command, family=_FAMILY[rule.family], fwmark=rule.mark,
                   fwmask=rule.mask, table=rule.table, priority=rule.priority, **iface)

    @staticmethod
    def _call(what: str, function, *arguments, **keywords) -> None:
        try:
            function(*arguments, **keywords)
        except (NetlinkError, OSError) as problem:
            raise RoutingError(f"{what}: {problem}") from None
