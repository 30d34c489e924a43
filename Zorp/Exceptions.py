"""What can go wrong in a policy, and the verdict each failure of a connection stands for.

Two families, two readers:

    ZorpException and its children      verdicts on one connection.  Policy code raises and catches
                                        them; `what` is the kind, `detail` the reason.
    PolicyError                         the policy itself cannot be used.  Raised while it loads,
                                        never for a connection; the loader adds file and line.
"""

from __future__ import annotations


class ZorpException(Exception):
    """A verdict on one connection.  `str()` is "what: detail"."""

    what = ""

    def __init__(self, detail=""):
        super().__init__(detail)
        self.detail = detail

    def __str__(self):
        return f"{self.what}: {self.detail}"


class ZoneException(ZorpException):
    """An address that no zone contains."""

    what = "Zone not found"


class ServiceException(ZorpException):
    """A service that does not exist or cannot be started."""

    what = "Service"


class DACException(ZorpException):
    """The policy forbids this connection."""

    what = "DAC policy violation"


class MACException(ZorpException):
    """A mandatory rule forbids this connection."""

    what = "MAC policy violation"


class AAException(ZorpException):
    """Authentication or authorization failed."""

    what = "Authentication or authorization failed"


AuthException = AAException


class LimitException(ZorpException):
    """A configured limit is reached."""

    what = "Limit error"


class InternalException(ZorpException):
    """The firewall contradicts itself."""

    what = "Internal error occured"


class UserException(ZorpException):
    """A parameter given by the policy is wrong or missing."""

    what = "Incorrect, or unspecified parameter"


class LicenseException(ZorpException):
    """Kept for policies that name it; nothing here is licensed."""

    what = "Attempt to use unlicensed components"


class MatcherException(ZorpException):
    """A matcher could not decide."""

    what = "Matcher error"


class ConfigException(ZorpException):
    """The configuration contradicts itself."""

    what = "Configuration error"


class PolicyError(ValueError):
    """The policy cannot be used.  Raised while it loads, never for a connection.

    `place` is "file:line" where the policy said what is wrong, for checks that run later than
    that line; None: the loader finds it in the traceback.
    """

    def __init__(self, problem: str, *, remedy: str, place: str | None = None) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy, self.place = problem, remedy, place
