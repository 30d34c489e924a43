"""Everything a policy needs: `from Zorp.Core import *`.

A list of names and nothing else; each is explained where it is defined.
"""

from __future__ import annotations

from Zorp import Zorp  # isort: skip   policies mean the module, not the package, by this name
from Zorp.Unbuilt import *
from Zorp.Zorp import *
from Zorp.Zorp import Common, Config, Globals, config, enum, errno, socket, sys, traceback
