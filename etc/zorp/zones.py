"""The networks of this site; imported by policy.py.

The most specific zone wins.  "internet" holds everything that no other zone does.
"""

from Zorp.Core import *

Zone(name="internet", addrs=["0.0.0.0/0", "::/0"])
Zone(name="office", addrs=["192.168.1.0/24", "fd00:1::/64"])
Zone(name="dmz", addrs=["172.16.40.0/24"])
Zone(name="dmz.mail", addrs=["172.16.40.25/32"], admin_parent="dmz")
