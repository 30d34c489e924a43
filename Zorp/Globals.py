"""What the policy has declared, by kind and name: the registries.

Theory of operation
    Loading a policy fills these; afterwards they are only read.  A worker process loads one
    policy in its life, so nothing here is ever replaced by another generation, and readers
    need no lock.  The three locks below are names that old policies and tools refer to; they
    guard the dictionary they are named after.

    `threads` and `dispatch_table` belong to this process, not to the policy: the first starts
    session threads (the runtime installs its pool), the second knows what to listen on.
"""

from __future__ import annotations

import threading

services = {}
zones = {}
rules = None
nat_policies = {}
resolver_policies = {}
matchers = {}
encryption_policies = {}
detectors = {}
stacking_providers = {}
authentication_providers = {}
authentication_policies = {}
authorization_policies = {}
auth_policies = {}
auth_caches = {}
external_authorization_waiting = {}
neyes_waiting_authorization_policies = {}
notification_policy = None
none_encryption = None

dispatches = []
deinit_callbacks = []
parsed_callbacks = []     # init() calls these after the instance functions, while `parsing` is still True

instance_name = ""
virtual_instance_name = ""
initial_policy_load = True
parsing = False           # True while init() runs: only then may dispatchers be created

kzorp_available = False
kzorp_responds_to_ping = False
kzorp_version = (0, 0)

external_authorization_waiting_lock = threading.Lock()
neyes_waiting_authorization_policies_lock = threading.Lock()
policy_zones_reload_lock = threading.Lock()

threads = None            # Zorp.ProxyGroup installs a simple starter, the runtime its pool
dispatch_table = None     # Zorp.acceptance.dispatch_table.DispatchTable


newer_policy = None       # in a worker of an older policy, after a reload with revocation: Zorp.runtime.consent


def quit_handler(exit_code):
    """End the instance; the runtime puts its own function here."""
    raise SystemExit(exit_code)
