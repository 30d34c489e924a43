"""What policies call the core: constants, log(), and the start and end of an instance.

`from Zorp.Core import *` makes the name `Zorp` mean this module, so policies write
`Zorp.log(...)`, `Zorp.config`, `Zorp.firewall_name = ...`.

Theory of operation
    The loader runs the policy file as the main module and then calls init(names, virtual_name,
    is_master), normally the one here: it calls the function of each instance name in the
    policy.  deinit() and cleanup() are the end
    of a policy; they run what others registered in Globals.deinit_callbacks.
"""

from __future__ import annotations

import enum
import errno
import socket
import sys
import traceback

from Zorp import Common, Config, Globals
from Zorp.acceptance import policy_load
from Zorp.Attach import Attach
from Zorp.acceptance.binds import (
    DBIface, DBIfaceGroup, DBIfaceGroupType, DBIfaceType, DBSockAddr, DBSockAddrType, DispatchBindType,
)
from Zorp.engine.builtin_proxy import BuiltinProxy
from Zorp.Config import config
from Zorp.Constants import *
from Zorp.acceptance.dispatch_table import Dispatch
from Zorp.Exceptions import (
    AAException, AuthException, ConfigException, DACException, InternalException, LicenseException, LimitException,
    MACException, MatcherException, ServiceException, UserException, ZoneException, ZorpException,
)
from Zorp.acceptance.instance_numbers import getInstanceId
from Zorp.Log import log
from Zorp.ProxyGroup import ProxyGroup, ProxyGroupType
from Zorp.SockAddr import SockAddrInet6Type, SockAddrInetType, SockAddrType, SockAddrUnixType
from Zorp.Stream import streamPair
from Zorp.Szig import szigEvent
from Zorp.acceptance.verdict import ConnectionVerdict

SharedType = object
firewall_name = "zorp"           # old policies assign it; nothing reads it


def init(names, virtual_name="", is_master=1):
    """Call the policy's function of every instance name; return TRUE.  PolicyError names one that is missing."""
    if not Globals.parsing:
        with policy_load.loading(names, virtual_name):
            return init(names, virtual_name, is_master)
    for function in policy_load.instance_functions(sys.modules["__main__"], names):
        function()
    return TRUE


def deinit(names, virtual_name=""):
    """End a policy: run every registered callback, each on its own."""
    log(None, CORE_DEBUG, 6, "Deinitialization requested for instance; name='%s'", (names[0],))
    for callback in Globals.deinit_callbacks:
        callback()


def cleanup(names, virtual_name="", is_master=1):
    """Last call before the process ends."""
    log(None, CORE_DEBUG, 6, "Cleaning up instance; name='%s'", (names[0],))


def purge():
    """Kept for policies that call it; there is nothing to purge."""


def notify(event, params):
    """Hand an event to the policy's notification policy, if it has one."""
    if Globals.notification_policy is not None:
        Globals.notification_policy.notify(event, params)


def notifyEvent(*args):
    """The old name of notify()."""
    notify(args[0] if args else "", args[1:])


def quit(exit_code):
    """End the whole instance with this exit status."""
    Globals.quit_handler(exit_code)


def isInitialPolicyLoad():
    """Return TRUE while the first policy since the start of the instance is loaded."""
    return TRUE if Globals.initial_policy_load else FALSE


def getKZorpResult(family, fd):
    """Return (client zone, server zone, dispatcher, service, rule id) for a connection, or None.

    The original asked its kernel module; here the rules of the policy are evaluated.
    """
    return Globals.rules.result_for_socket(family, fd) if Globals.rules is not None else None
