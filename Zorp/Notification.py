"""Notifications of the commercial edition: the module exists so that policies can import it.

`Globals.notification_policy` may be set to any object with a method notify(event, params);
Zorp.notify() hands events to it.  There is nothing else, as in every free release.
"""

from __future__ import annotations
