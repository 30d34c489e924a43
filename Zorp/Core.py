"""Everything a policy needs: `from Zorp.Core import *`.

A list of names and nothing else; each is explained where it is defined.  Importing it loads
the whole policy language, so that any module may be imported alone afterwards.
"""

from __future__ import annotations

from Zorp import FileLock as _FileLock
from Zorp import KZorp as _KZorp
from Zorp.language import star_names as _StarNames
from Zorp import Zorp as _Zorp
from Zorp.Chainer import (
    AbstractChainer, AvailabilityChainer, ConnectChainer, DirectedChainer, FailoverChainer, InbandChainer,
    LeastConnectionChainer, MultiTargetChainer, RoundRobinAvailabilityChainer, RoundRobinChainer, SideStackChainer,
    SourceIPBasedChainer, StateBasedChainer, TransparentChainer,
)
from Zorp.Dispatch import CSZoneDispatcher, Dispatcher, NDimensionDispatcher, RuleDispatcher, ZoneDispatcher
from Zorp.Domain import Inet6Domain, InetDomain
from Zorp.Listener import CSZoneListener, Listener, ZoneListener
from Zorp.Matcher import (
    AbstractMatcher, CombineMatcher, DNSMatcher, MatcherPolicy, RegexpFileMatcher, RegexpMatcher,
    SmtpInvalidRecipientMatcher, WindowsUpdateMatcher,
)
from Zorp.NAT import (
    NAT46, NAT64, AbstractNAT, ForgeClientSourceNAT, GeneralNAT, HashNAT, NATPolicy, OneToOneMultiNAT, OneToOneNAT,
    RandomNAT, StaticNAT,
)
from Zorp.Plug import PlugProxy as _PlugProxy
from Zorp.Proxy import proxyLog
from Zorp.Receiver import CSZoneReceiver, Receiver, ZoneReceiver
from Zorp.Resolver import DNSResolver, HashResolver, ResolverPolicy
from Zorp.Router import AbstractRouter, DirectedRouter, InbandRouter, TransparentRouter
from Zorp.Rule import PortRange, Rule
from Zorp.Service import DenyIPv4, DenyIPv6, DenyService, PFService, Service
from Zorp.SockAddr import (
    SockAddr, SockAddrInet, SockAddrInet6, SockAddrInetHostname, SockAddrInetRange, SockAddrUnix,
)
from Zorp.Stack import RemoteStackingBackend, StackingProvider
from Zorp.Subnet import Inet6Subnet, InetSubnet
from Zorp.language.unbuilt import *
from Zorp.Zone import Inet6Zone, InetZone, Zone
from Zorp.Zorp import *
from Zorp.Zorp import Common, Config, Globals, config, enum, errno, socket, sys, traceback

Zorp = _Zorp                                  # policies mean the module, not the package, by this name
PFService.relay_class = _PlugProxy            # Service stands below the proxies and cannot name one
_StarNames.complete_loaded()
