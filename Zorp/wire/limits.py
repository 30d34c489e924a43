"""Every number that bounds what a peer may send, in one place, with its unit in its name.

A proxy fills one of these after config() from its attributes; 0 means "no limit" where the
comment says so.  Sizes in bytes, times in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLimits:
    """Sizes of a mail address (RFC 5321, 4.5.3.1.1 to 4.5.3.1.3)."""

    local_bytes: int = 64
    domain_bytes: int = 255
    path_bytes: int = 256           # with angle brackets


@dataclass(frozen=True, slots=True, kw_only=True)
class SmtpLimits:
    """What one SMTP session may cost; attributes of the proxy where named."""

    line_bytes: int = 4096          # with line end, either side; attribute max_line_length
    command_bytes: int = 512        # without line end; attribute max_request_length
    sasl_line_bytes: int = 12288    # AUTH and its dialogue, no line end; attribute max_auth_request_length
    sasl_rounds: int = 20           # lines of the client in one AUTH dialogue
    reply_line_bytes: int = 512     # without line end; attribute max_response_length
    reply_lines: int = 100
    reply_bytes: int = 65536        # all lines of one reply together
    recipients: int = 0             # per transaction, 0: no limit; attribute max_recipients
    errors: int = 20                # refused commands, then 421 and close, 0: no limit; attribute max_errors
    message_bytes: int = 0          # body of one message, 0: no limit; attribute max_message_size
    unconnected_commands: int = 20  # while there is no server
    idle_ms: int = 600_000          # one read or write, either side; attribute timeout
    command_ms: int = 300_000       # from the first byte of a command to its end; attribute command_timeout


# RFC 5321 4.5.3.1.9: what an extension in force adds to the longest MAIL and RCPT command
MAIL_BYTES_ADDED = {"SIZE": 26, "AUTH": 500, "DSN": 500, "SMTPUTF8": 10}
RCPT_BYTES_ADDED = {"DSN": 500, "SMTPUTF8": 10}

PARAMETER_KEYWORD_BYTES = 31
PARAMETER_VALUE_BYTES = 255
EXTENSION_PARAMETER_BYTES = 500     # ORCPT (RFC 3461), AUTH (RFC 4954)
ENVELOPE_ID_BYTES = 100             # ENVID (RFC 3461)
CHUNK_BYTES = 2**31 - 1             # one BDAT

PATH_LIMITS = PathLimits()
