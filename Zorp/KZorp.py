"""What policies and tools found in the module that talked to the kernel, without a kernel module.

The rules of an instance are decided in this process (Zorp.Rule).  What the original sent to its
kernel module, the configuration of an instance, is here a list of plain messages: whoever
compiles packet rules, or wants to show a configuration, takes it from commitTransaction().

Theory of operation
    openHandle() gives a Transaction.  The download functions append messages to it;
    commitTransaction() puts its messages in force as a whole (`running`), or not at all.
    Messages are dictionaries of texts, numbers and tuples of those.

Zorp.Rule.packet_of() and the listener's preparation are named here too, because whoever
dispatches by rules needs both.
"""

from __future__ import annotations

import threading

from Zorp import Globals
from Zorp.Exceptions import PolicyError
from Zorp.Rule import packet_of
from Zorp.transport.interfaces import remember_incoming_interface
from Zorp.Zone import Zone

__all__ = [
    "closeKZorpHandle", "commitTransaction", "createAddZoneMessageFromZone",
    "createAddZoneSubnetMessagesFromZoneAddresses", "downloadBindAddresses", "downloadDispatchers",
    "downloadKZorpConfig", "downloadServices", "downloadStaticZones", "downloadZones", "exchangeMessage",
    "exchangeMessages", "flushKZorpConfig", "netlinkmsg_handler", "openHandle", "packet_of", "prepare_listener",
    "startTransaction",
]

prepare_listener = remember_incoming_interface


class RunningConfiguration:
    """The messages in force per instance.

    _messages_lock guards _messages; a committed list is never changed afterwards.
    """

    def __init__(self):
        self._messages_lock = threading.Lock()
        self._messages: dict[str, tuple] = {}

    def replace(self, instance_name, messages):
        with self._messages_lock:
            self._messages[instance_name] = tuple(messages)

    def of(self, instance_name):
        """Return the messages in force for an instance; none: an empty tuple."""
        with self._messages_lock:
            return self._messages.get(instance_name, ())


running = RunningConfiguration()


class Transaction:
    """Messages that are to come into force together; for one thread."""

    def __init__(self):
        self.instance_name = None
        self.messages = []

    def begin(self, instance_name):
        if self.instance_name is not None:
            raise PolicyError(f"A transaction is open already; instance='{self.instance_name}'",
                              remedy="commit it before starting another")
        self.instance_name, self.messages = instance_name, []

    def commit(self):
        if self.instance_name is None:
            raise PolicyError("No transaction is open", remedy="call startTransaction() first")
        running.replace(self.instance_name, self.messages)
        self.instance_name = None


def openHandle():
    """Return a Transaction in which nothing has begun."""
    return Transaction()


def closeKZorpHandle():
    """Forget the configuration of this instance."""
    running.replace(Globals.instance_name, ())


def startTransaction(h, *args):
    """Begin: (h, instance_name), or (h, type, instance_name) as up to 3.9.0."""
    h.begin(args[-1])


def commitTransaction(h):
    """Put the messages of the transaction in force."""
    h.commit()


def exchangeMessage(h, *args):
    """Add a message: (h, payload), or (h, msg, payload) as up to 3.9.0."""
    h.messages.append(args[-1])


def exchangeMessages(h, messages):
    """Add several messages."""
    for message in messages:
        exchangeMessage(h, message)


def netlinkmsg_handler(msg):
    """Kept for callers of 3.9.0; no kernel module sends anything."""


def createAddZoneMessageFromZone(zone):
    """Return the message that defines a zone."""
    return zone.buildKZorpMessage()[0]


def createAddZoneSubnetMessagesFromZoneAddresses(zone):
    """Return the messages that give a zone its subnets."""
    return zone.buildKZorpMessage()[1:]


def downloadZones(h):
    """Add all zones, parents first, and their subnets."""
    exchangeMessages(h, _zone_messages(Globals.zones.values()))


def _zone_messages(zones):
    zones = sorted(zones, key=Zone.getDepth)
    return [createAddZoneMessageFromZone(zone) for zone in zones] + [
        message for zone in zones for message in createAddZoneSubnetMessagesFromZoneAddresses(zone)]


def downloadStaticZones(zones):
    """Put zones in force: for all instances, under the name that the original gave them."""
    running.replace(".global", _zone_messages(zones))


def downloadServices(h):
    """Add the names and kinds of all services."""
    exchangeMessages(h, [{"message": "add service", "name": name, "type": type(service).__name__}
                         for name, service in Globals.services.items()])


def downloadDispatchers(h):
    """Add the rule set of the instance and its rules, ascending by id."""
    rules = Globals.rules or ()
    exchangeMessage(h, {"message": "add dispatcher", "name": Globals.instance_name, "num_rules": len(rules)})
    for rule in rules:
        exchangeMessages(h, rule.buildKZorpMessage(Globals.instance_name))


def downloadBindAddresses(h):
    """Add the addresses on which the rule dispatcher listens."""
    chains = Globals.dispatch_table.chains() if Globals.dispatch_table is not None else ()
    exchangeMessages(h, [{"message": "add bind", "instance": Globals.instance_name, "bind": chain.bind.format()}
                         for chain in chains if chain.params.rule_chain])


def downloadKZorpConfig(instance_name, is_master=True):
    """Put the whole configuration of the instance in force, as one step."""
    handle = openHandle()
    startTransaction(handle, instance_name)
    if is_master:
        downloadServices(handle)
        downloadDispatchers(handle)
    downloadBindAddresses(handle)
    commitTransaction(handle)


def flushKZorpConfig(instance_name):
    """Forget the configuration of an instance."""
    running.replace(instance_name, ())
