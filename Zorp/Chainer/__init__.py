"""Chainers: how a proxy gets its connection to the server.

    Service("web", HttpProxy, chainer=ConnectChainer(timeout_connect=5000))

Which one:

    ConnectChainer                  the (first) target of the session; the default
    MultiTargetChainer              several targets in turn
    RoundRobinChainer               in turn, passing over those that are down
    FailoverChainer                 the first that is not down, in order of preference
    SourceIPBasedChainer            the same client always meets the same target
    LeastConnectionChainer          the target with the fewest connections
    AvailabilityChainer, RoundRobinAvailabilityChainer      what a site's checker says is up
    SideStackChainer                a second proxy in between
    TransparentChainer, DirectedChainer, InbandChainer, FailoverChainer(hosts)
                                    release 1: also decide on the target

Sites derive from these or from AbstractChainer.  Each concept has a module here, named in the
imports below; what they need to know of each other is written there.
"""

from Zorp.Chainer._base import AbstractChainer
from Zorp.Chainer._connect import ConnectChainer
from Zorp.Chainer._first_generation import DirectedChainer, FailoverChainer, InbandChainer, TransparentChainer
from Zorp.Chainer._sidestack import SideStackChainer
from Zorp.Chainer._targets import (
    AvailabilityChainer,
    LeastConnectionChainer,
    MultiTargetChainer,
    RoundRobinAvailabilityChainer,
    RoundRobinChainer,
    SourceIPBasedChainer,
    StateBasedChainer,
)

__all__ = [
    "AbstractChainer", "AvailabilityChainer", "ConnectChainer", "DirectedChainer", "FailoverChainer", "InbandChainer",
    "LeastConnectionChainer", "MultiTargetChainer", "RoundRobinAvailabilityChainer", "RoundRobinChainer",
    "SideStackChainer", "SourceIPBasedChainer", "StateBasedChainer", "TransparentChainer",
]
