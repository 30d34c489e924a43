"""The instance's side of packet rules: is kzorpd there, and what it is told before the policy serves.

Theory of operation
    Before the policy loads a worker asks whether kzorpd answers: policies may look at
    Globals.kzorp_available.  When every worker of a generation has loaded and bound, one of them
    hands the instance's description over; only when kzorpd has put it in force does the
    generation serve.  A refusal is a load that failed: the start ends, a reload changes nothing.
    The replacement of a crashed worker asks too, but hands nothing over and is refused by nobody:
    its policy is the one whose rules are in force, whatever its file says meanwhile.

    --packet-rules says who is responsible:

        auto            kzorpd, if it answers; else there are listeners only, and a policy with rules says so
        kzorpd          kzorpd; without it the instance does not start
        administrator   packet rules are there, somebody else sees to them (kzorp-setup)
        none            listeners only

    config.options.kzorp_enabled = FALSE in the policy means none, too, and takes away what
    kzorpd has of the instance.
"""

from __future__ import annotations

from Zorp import Globals
from Zorp.Config import config
from Zorp.Exceptions import PolicyError
from Zorp.Log import log
from Zorp.rules.description import DescriptionError, check, to_json
from Zorp.runtime.describe import describe
from Zorp.runtime.options import Options
from Zorp.transport.kzorpd import KzorpdAway, KzorpdError, ask, socket_path

KZORP_VERSION = (4, 6)           # what policies of the original compared with
HELLO_DEADLINE_S = 5.0
HAND_OVER_DEADLINE_S = 120.0


class RulesRefused(Exception):
    """The policy must not serve; `str()` says why."""


class PacketRules:
    """What one worker has to do with packet rules; for its main thread."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._path = socket_path(options.kzorpd_dir)
        self._kzorpd_answers = False
        self._absence = ""               # why kzorpd does not answer

    @property
    def wanted(self) -> bool:
        """Say whether the loaded policy has rules that kzorpd has to put in force."""
        return bool(self._options.packet_rules in ("auto", "kzorpd") and config.options.kzorp_enabled
                    and Globals.rules is not None and len(Globals.rules))

    def announce(self, *, in_force: bool) -> None:
        """Before the policy loads: set what policies see.  Raises RulesRefused, but not when its rules are in force."""
        way = self._options.packet_rules
        active = way == "administrator"
        if way in ("auto", "kzorpd"):
            try:
                active = self._greet(required=way == "kzorpd") == "compiled"
            except RulesRefused:
                if not in_force:
                    raise
                active = True
        Globals.kzorp_available = active
        Globals.kzorp_version = KZORP_VERSION if active else (0, 0)

    def _greet(self, *, required: bool) -> str:
        """Return the mode in which kzorpd works, "" when there is none."""
        try:
            mode = ask(self._path, "hello", HELLO_DEADLINE_S).get("mode", "")
        except KzorpdAway as problem:
            if required:
                raise RulesRefused(str(problem)) from None
            self._absence = str(problem)
            return ""
        except KzorpdError as problem:
            raise RulesRefused(_refusal(problem)) from None
        self._kzorpd_answers = True
        return mode

    def hand_over(self) -> None:
        """Before the policy serves: have its packet rules put in force.  Raises RulesRefused."""
        if not config.options.kzorp_enabled:
            Globals.kzorp_available, Globals.kzorp_version = False, (0, 0)
        if not self._kzorpd_answers:
            if self.wanted:
                log(None, "core.error", 2, "Nobody puts the packet rules of this instance in force, traffic comes "
                    "only by those that were loaded before, if any; rules='%d', error='%s'; start kzorpd "
                    "(systemctl enable --now kzorp-setup kzorpd), or say who sees to them: --packet-rules "
                    "administrator (kzorp-setup load), or none (listeners only)",
                    (len(Globals.rules), self._absence))
            return
        try:
            if not config.options.kzorp_enabled:
                ask(self._path, "remove", HAND_OVER_DEADLINE_S, instance=self._options.instance)
                return
            description = describe(self._options)
            check(description)
            ask(self._path, "instance", HAND_OVER_DEADLINE_S, description=to_json(description))
        except (KzorpdError, PolicyError, DescriptionError) as problem:
            raise RulesRefused(_refusal(problem)) from None
        log(None, "core.info", 4, "Packet rules are in force; rules='%d', services='%d', zones='%d'",
            (len(description.rules), len(description.services), len(description.zones)))


def stopped(options: Options) -> None:
    """After an instance has ended in good order: tell kzorpd, which may take its rules away (on_stop in kzorp.yml)."""
    if options.packet_rules not in ("auto", "kzorpd"):
        return
    try:
        ask(socket_path(options.kzorpd_dir), "stopped", HELLO_DEADLINE_S, instance=options.instance)
    except KzorpdAway:
        return
    except KzorpdError as problem:
        log(None, "core.error", 3, "Packet rules stay as they are; error='%s'", (problem,))


def _refusal(problem: Exception) -> str:
    return f"Packet rules refused; error='{problem}'"
