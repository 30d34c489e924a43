"""The options that a policy may set: `config.options.language = "hu"` and so on.

`config` is a tree of containers; each holds plain attributes with the defaults of the original
(times in milliseconds, sizes in bytes, booleans 0 and 1).  Policies write it while they load,
everything else reads it.  A policy may add containers of its own with addConfigContainer().

What is set without being an option
    Sites keep values of their own in `config.options`, so any name can be set.  But a typing
    mistake there would leave a limit at its default without a word: at the end of the load a
    name that nearly spells an option is an error, and any other is named in the log.

Options of ours, not of the original:
    options.zone_dac                 are the service lists of zones enforced: "auto" (when a zone has one), "on", "off"
    options.zone_dns_grace           seconds a zone keeps the last addresses of a host name that no longer resolves
    options.session_id_format        "3", "5", "7" (default) or "short": the form of session ids
    options.permit_local_targets     may a name given in-band lead to the firewall itself (FALSE)
    options.permit_own_listeners     may a service connect to a listener of its own instance (FALSE)
    options.max_queued_sessions      connections that may wait for a thread; beyond they are refused
    options.max_accepts_per_second   new connections per second (0: no limit)
    options.proxy_protocol           subnets of load balancers that send a PROXY header to rules
    options.rule_listen_port         port of the listeners that rules use; 0: any free one
    options.max_connections_per_client   open sessions of one client address; 0: any number
    options.max_connections_per_zone     of all clients of one zone, without the zones below it; 0: any number
    options.stack_program_ignore_exit    accept the output of a stacked program whatever its exit status (FALSE)
    options.stack_program_exit_wait      milliseconds from the end of its output to its exit (1000)
    options.stack_program_cpu_seconds, options.stack_program_memory    limits of each of its processes; 0: none
    options.max_udp_sessions         UDP sessions of one listener; beyond, the one idle for longest ends (1000)
    options.max_udp_sessions_per_client  of them, those of one client address; beyond, datagrams are dropped (100)
    options.one_cpu                  keep the threads of a process on one CPU, see Zorp.transport.cpus (TRUE)
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.language.caller import policy_caller

TRUE = 1
FALSE = 0


class UnknownOption(NamedTuple):
    """A name that a policy set although no option has it."""

    name: str            # container and name: options.site_name
    place: str           # file:line


_unknown: dict[str, UnknownOption] = {}      # written while a policy loads


class ConfigContainer:
    """One branch of the tree: attributes, nothing else."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        branch = _BRANCH.get(id(self))
        if branch is not None and name not in self.__dict__:
            _unknown[name] = UnknownOption(f"{branch}.{name}", str(policy_caller()))
        elif branch == "options" and name in _NUMBERS:
            value = arguments.whole_number(
                "config.options", name, value, least=_NUMBERS[name].start, most=_NUMBERS[name].stop - 1)
        self.__dict__[name] = value


_BRANCH: dict[int, str] = {}                 # the branches with options of ours, by object
_NUMBERS: dict[str, range] = {}              # what those of config.options that are numbers may be
_TIMES = ("timeout_server_connect", "stack_program_exit_wait")       # ms, for timers of the kernel


config = ConfigContainer()


def addConfigContainer(cont):
    """Add an empty branch `config.<cont>` and make it a name of this module; return nothing."""
    container = ConfigContainer()
    setattr(config, cont, container)
    globals()[cont] = container


config.addConfigContainer = addConfigContainer       # policies reach it both ways
for _name in ("audit", "blob", "dirs", "options"):
    addConfigContainer(_name)

config.audit.__dict__.update(
    audit=TRUE, compress=TRUE, compress_level=1,
    encrypt=FALSE, encrypt_certificate=None, encrypt_certificate_file=None,
    encrypt_certificate_list=None, encrypt_certificate_list_file=None,
    ids=FALSE, ids_dst_mac="", ids_interface="", ids_src_mac="",
    per_session=FALSE, rate_limit=2097152, rate_notification_interval=300,
    reopen_size_threshold=2000000000, reopen_time_threshold=28800,
    sign=FALSE, sign_certificate=None, sign_certificate_file=None, sign_interval=30,
    sign_private_key=None, sign_private_key_file=None,
    terminate_on_max_size=FALSE, timestamp=FALSE, timestamp_length=3072, timestamp_policy="", timestamp_url="",
    write_size_max=2147483648,
)
config.blob.__dict__.update(
    hiwat=134217728, lowat=100663296, max_disk_usage=1073741824, max_mem_usage=268435456,
    noswap_max=16384, temp_directory="/var/lib/zorp/tmp/",
)
config.dirs.__dict__.update(
    libdir="/usr/lib/zorp", pidfiledir="/var/run/zorp", sbindir="/usr/sbin", sysconfdir="/etc/zorp",
)
config.options.__dict__.update(
    dscp_prio_mapping={},
    inbound_service_cache_threshold=1000, outbound_service_cache_threshold=1000,
    kzorp_enabled=TRUE, language="en",
    package_suffix="", product_name="Zorp", ssl3_enabled=FALSE,
    timeout_server_connect=30000, zone_cache_shift_threshold=1000, zone_dispatcher_shift_threshold=1000,
    zone_dac="auto", zone_dns_grace=3600,
    max_queued_sessions=1000, max_accepts_per_second=0,
    session_id_format="7", permit_local_targets=FALSE, permit_own_listeners=FALSE,
    proxy_protocol=(),
    rule_listen_port=0, max_connections_per_client=0, max_connections_per_zone=0, one_cpu=TRUE,
    stack_program_ignore_exit=FALSE, stack_program_exit_wait=1000, stack_program_cpu_seconds=0, stack_program_memory=0,
    max_udp_sessions=1000, max_udp_sessions_per_client=100,
)
del _name
audit, blob, dirs, options = config.audit, config.blob, config.dirs, config.options
_KNOWN = {branch: frozenset(vars(getattr(config, branch))) for branch in ("audit", "blob", "dirs", "options")}
_NUMBERS.update((name, range(1, arguments.LONGEST_MS) if name in _TIMES else range(1 << 62))
                for name, value in vars(options).items() if isinstance(value, int))
_BRANCH.update({id(getattr(config, branch)): branch for branch in _KNOWN})


def take_unknown_options():
    """Return the UnknownOptions set since the last call, for the log; raises PolicyError for a near miss."""
    found = list(_unknown.values())
    _unknown.clear()
    for option in found:
        branch, name = option.name.split(".", 1)
        meant = next((known for known in sorted(_KNOWN[branch]) if _nearly(name, known)), None)
        if meant is not None:
            raise PolicyError(f"No such option; option='config.{option.name}'", place=option.place,
                              remedy=f"write config.{branch}.{meant}")
    return found


def _nearly(name, known):
    """Return whether a typing mistake could have made `name` of a known one: one in four characters, two at most."""
    most = min(2, len(known) // 4)
    if abs(len(name) - len(known)) > most:
        return False
    row = range(len(known) + 1)              # edit distances of what was read of `name` to each beginning of `known`
    for count, char in enumerate(name, 1):
        above, row = row, [count]
        for place, other in enumerate(known):
            row.append(min(above[place] + (char != other), above[place + 1] + 1, row[place] + 1))
    return row[-1] <= most


__all__ = [
    "FALSE", "TRUE", "ConfigContainer", "addConfigContainer", "audit", "blob", "config", "dirs", "options", "sys",
]
