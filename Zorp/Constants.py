"""The numbers and names that policies and every module of ours share.

They stand below everything else so that no module has to import the policy's own view,
Zorp.Zorp, which exports them all again.  TRUE and FALSE are the integers 1 and 0 because
policies compute and compare with them.
"""

from __future__ import annotations

import enum
import socket

TRUE = 1
FALSE = 0

# verdicts on a protocol element, under both of their names
ZV_UNSPEC = Z_UNSPEC = 0
ZV_ACCEPT = Z_ACCEPT = 1
ZV_DENY = Z_DENY = 2
ZV_REJECT = Z_REJECT = 3
ZV_ABORT = Z_ABORT = 4
ZV_DROP = Z_DROP = 5
ZV_POLICY = Z_POLICY = 6
ZV_ERROR = Z_ERROR = 7

ZD_PROTO_AUTO = 0
ZD_PROTO_TCP = 1
ZD_PROTO_UDP = 2
ZD_PROTO_NAME = ("AUTO", "TCP", "UDP")

Z_PORT_ANY = -1
Z_PORT_GROUP = -2
Z_PORT_EXACT = -3
Z_PORT_RANDOM = -4

Z_KEEPALIVE_NONE = 0
Z_KEEPALIVE_CLIENT = 1
Z_KEEPALIVE_SERVER = 2
Z_KEEPALIVE_BOTH = 3

Z_BACL_REQUIRED = 1
Z_BACL_SUFFICIENT = 2

Z_STACK_PROXY = 1
Z_STACK_PROGRAM = 2
Z_STACK_REMOTE = 3
Z_STACK_PROVIDER = 4
Z_STACK_CUSTOM = 5
Z_STACK_PROXY_IN_SESSION = 6

Z_PROXY_PRI_LOW = 0
Z_PROXY_PRI_NORMAL = 1
Z_PROXY_PRI_HIGH = 2
Z_PROXY_PRI_URGENT = 3

Z_SSL_VERIFY_NONE = 0
Z_SSL_VERIFY_OPTIONAL_UNTRUSTED = 1
Z_SSL_VERIFY_OPTIONAL_TRUSTED = 2
Z_SSL_VERIFY_REQUIRED_UNTRUSTED = 3
Z_SSL_VERIFY_REQUIRED_TRUSTED = 4

Z_NOT = "Z_NOT"
Z_AND = "Z_AND"
Z_OR = "Z_OR"
Z_XOR = "Z_XOR"
Z_EQ = "Z_EQ"
Z_NE = "Z_XOR"             # a slip of the original that matchers in the field rely on

Z_SZIG_THREAD_START = 0
Z_SZIG_THREAD_STOP = 1
Z_SZIG_TICK = 2
Z_SZIG_COUNTED_IP = 3
Z_SZIG_CONNECTION_PROPS = 4
Z_SZIG_CONNECTION_STOP = 5
Z_SZIG_AUDIT_START = 6
Z_SZIG_AUDIT_STOP = 7
Z_SZIG_RELOAD = 8
Z_SZIG_AUTH_PENDING_BEGIN = 9
Z_SZIG_AUTH_PENDING_FINISH = 10
Z_SZIG_SERVICE_COUNT = 11
Z_SZIG_CONNECTION_START = 12

Z_SZIG_TYPE_LONG = 1
Z_SZIG_TYPE_TIME = 2
Z_SZIG_TYPE_STRING = 3
Z_SZIG_TYPE_PROPS = 4
Z_SZIG_TYPE_CONNECTION_PROPS = 5

AF_UNSPEC = int(socket.AF_UNSPEC)
AF_INET = int(socket.AF_INET)
AF_INET6 = int(socket.AF_INET6)

CORE_SESSION = "core.session"
CORE_DEBUG = "core.debug"
CORE_ERROR = "core.error"
CORE_POLICY = "core.policy"
CORE_MESSAGE = "core.message"
CORE_AUTH = "core.auth"
CORE_INFO = "core.info"
CORE_SUMMARY = "core.summary"
CORE_ALERTING = "core.alerting"
TLS_ACCOUNTING = "tls.accounting"


class ZEndpoint(enum.IntEnum):
    """The two sides of a proxy."""

    EP_CLIENT = 0
    EP_SERVER = 1


__all__ = [_name for _name in globals() if _name.isupper() or _name[:2] in ("Z_", "ZE")]
