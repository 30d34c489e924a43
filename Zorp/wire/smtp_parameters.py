"""ESMTP parameters of MAIL and RCPT (RFC 5321, 4.1.2): keyword [ "=" value ], checked by table.

check_parameters() knows, for each keyword, the extension it belongs to and the form of its
value, and refuses everything else: a parameter that we do not understand could change what the
server does with the message.  ParameterError says which reply it deserves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from Zorp.wire.errors import WireError
from Zorp.wire.limits import (
    ENVELOPE_ID_BYTES,
    EXTENSION_PARAMETER_BYTES,
    PARAMETER_KEYWORD_BYTES,
    PARAMETER_VALUE_BYTES,
)
from Zorp.wire.text import to_policy

_PARAMETER = re.compile(rb"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~\x80-\xff]+))?")
_ORCPT = re.compile(rb"([A-Za-z0-9-]+);(.*)", re.DOTALL)

_XTEXT = rb"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+"
_DATE_TIME = rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
_NOTIFY_WORD = rb"(?:SUCCESS|FAILURE|DELAY)"


class ParameterError(WireError):
    """A parameter that is unknown, malformed, given twice, or belongs to no extension in force."""

    def __init__(self, text: str, parameters: bytes, *, reply_code: int = 500) -> None:
        super().__init__(text, to_policy(parameters))
        self.reply_code = reply_code


class _Form(NamedTuple):
    """What one parameter looks like."""

    extension: str
    value: re.Pattern | None            # None: the keyword stands alone
    problem: str = ""                   # "": the general text
    inactive_code: int = 500            # reply when the extension is not in force
    limit_bytes: int = PARAMETER_VALUE_BYTES


def _form(pattern: bytes) -> re.Pattern:
    return re.compile(pattern, re.IGNORECASE)


MAIL_FORMS = {
    "SIZE": _Form("SIZE", _form(rb"[0-9]{1,20}"), "Invalid SIZE extension in the MAIL command; extensions='%s'"),
    "BODY": _Form("8BITMIME", _form(rb"7BIT|8BITMIME|BINARYMIME"),
                  "Invalid BODY extension in the MAIL command; extensions='%s'"),
    "AUTH": _Form("AUTH", _form(_XTEXT + rb"|<>"), "Invalid AUTH sender, not an xtext; extensions='%s'",
                  limit_bytes=EXTENSION_PARAMETER_BYTES),
    "SMTPUTF8": _Form("SMTPUTF8", None),
    "RET": _Form("DSN", _form(rb"FULL|HDRS"), inactive_code=555),
    "ENVID": _Form("DSN", _form(_XTEXT), inactive_code=555, limit_bytes=ENVELOPE_ID_BYTES),
    "REQUIRETLS": _Form("REQUIRETLS", None, inactive_code=550),
    "BY": _Form("DELIVERBY", _form(rb"[+-]?[0-9]{1,9};[NR]T?")),
    "MT-PRIORITY": _Form("MT-PRIORITY", _form(rb"-?[0-9]")),
    "HOLDFOR": _Form("FUTURERELEASE", _form(rb"[1-9][0-9]{0,8}")),
    "HOLDUNTIL": _Form("FUTURERELEASE", _form(_DATE_TIME)),
    "SOLICIT": _Form("NO-SOLICITING", _form(rb"[A-Za-z0-9.:_,-]+")),
}
RCPT_FORMS = {
    "NOTIFY": _Form("DSN", _form(rb"NEVER|" + _NOTIFY_WORD + rb"(?:," + _NOTIFY_WORD + rb"){0,2}"), inactive_code=555),
    "ORCPT": _Form("DSN", _ORCPT, inactive_code=555, limit_bytes=EXTENSION_PARAMETER_BYTES),
    "RRVS": _Form("RRVS", _form(_DATE_TIME + rb"(?:;[CR])?")),
}
_FORMS = {"MAIL": MAIL_FORMS, "RCPT": RCPT_FORMS}


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of one command, checked."""

    wire: bytes = b""                   # as forwarded: single spaces between them, none around
    size: int = 0                       # SIZE=, 0 when not given
    utf8: bool = False                  # SMTPUTF8 was given
    binary: bool = False                # BODY=BINARYMIME


NO_PARAMETERS = Parameters()


def check_parameters(verb: str, text: bytes, active: frozenset[str]) -> Parameters:
    """Return the parameters in `text`, what stands behind the path of MAIL or RCPT.

    active: keywords of the extensions in force.  Raises ParameterError.
    """
    if not text.strip(b" "):
        return NO_PARAMETERS
    problem = f"Invalid extension in the {verb} command; extensions='%s'"
    if not text.startswith(b" "):
        raise ParameterError(problem, text)
    kept: dict[str, bytes] = {}
    facts = {}
    for token in filter(None, text.split(b" ")):
        keyword, value = _split(token, problem, text)
        form = _FORMS[verb].get(keyword)
        if form is None or _needed_extension(form, value) not in active:
            raise ParameterError(problem, text, reply_code=form.inactive_code if form else 500)
        if keyword in kept:
            raise ParameterError(f"Duplicate extension in the {verb} command; extensions='%s'", text, reply_code=501)
        if not _fits(form, keyword, value, utf8="SMTPUTF8" in active):
            raise ParameterError(form.problem or problem, text)
        kept[keyword] = token
        if keyword == "SIZE":
            facts["size"] = int(value)
            kept[keyword] = b"SIZE=%d" % facts["size"]
        elif keyword == "SMTPUTF8":
            facts["utf8"] = True
        elif keyword == "BODY":
            facts["binary"] = value.upper() == b"BINARYMIME"
    return Parameters(b" ".join(kept.values()), **facts)


def _needed_extension(form: _Form, value: bytes | None) -> str:
    return "BINARYMIME" if (value or b"").upper() == b"BINARYMIME" else form.extension


def _split(token: bytes, problem: str, text: bytes) -> tuple[str, bytes | None]:
    parts = _PARAMETER.fullmatch(token)
    if parts is None or len(parts[1]) > PARAMETER_KEYWORD_BYTES:
        raise ParameterError(problem, text)
    return parts[1].decode("ascii").upper(), parts[2]


def _fits(form: _Form, keyword: str, value: bytes | None, *, utf8: bool) -> bool:
    if form.value is None or value is None:
        return form.value is None and value is None
    if len(value) > form.limit_bytes:
        return False
    if keyword == "ORCPT":
        return _is_original_recipient(value, utf8=utf8)
    return form.value.fullmatch(value) is not None


def _is_original_recipient(value: bytes, *, utf8: bool) -> bool:
    """Tell whether this is addr-type ";" xtext (RFC 3461, 4.2), or UTF-8 for the type "utf-8" (RFC 6533)."""
    parts = _ORCPT.fullmatch(value)
    if parts is None:
        return False
    if utf8 and parts[1].lower() == b"utf-8":
        return bool(parts[2])
    return re.fullmatch(_XTEXT, parts[2], re.IGNORECASE) is not None
