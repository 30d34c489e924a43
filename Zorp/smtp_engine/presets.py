"""What loadSMTP() and loadESMTP() put into the tables: commands, replies, extensions of everyday mail.

Beside the codes of the original the replies hold those that servers use today; a code that no
entry knows reaches the client as a general failure of its class.  A code of one digit stands
for all that begin with it.
"""

from __future__ import annotations

from Zorp.engine.policy_hash import CONSUME, WILDCARD, DimHash, PolicyHash, Preset

_ACCEPT = 1

_SMTP_REPLIES = {
    "Null": "220 554 421 521 4 5",
    "*": "421 500 501",
    "HELO": "250 504 550 450 451 502 554",
    "MAIL": "250 450 451 452 503 530 550 552 553 454 455 501 541 551 554 555",
    "RCPT": "250 251 450 451 452 503 530 550 551 552 553 554 252 454 455 521 541 555 556",
    "DATA": "354 250 530 451 452 503 550 552 554 450 421 454 521 541 555",
    "RSET": "250 2",
    "QUIT": "221 2",
    "NOOP": "250 4 5",
}
_ESMTP_REPLIES = {
    "EHLO": "250 504 550 450 451 502 554",
    "AUTH": "235 334 432 454 501 503 504 534 535 538 500 421 530 550 554",
    "ETRN": "250 251 252 253 458 459 500 501 530",
    "STARTTLS": "220 454 501 4 5",
}


def reply_table() -> DimHash:
    """Return an empty `response` table."""
    return DimHash(WILDCARD, CONSUME, least_parts=2)


def _replies(codes: dict[str, str]) -> DimHash:
    table = reply_table()
    table.update({(verb, code): _ACCEPT for verb, texts in codes.items() for code in texts.split()})
    return table


def _accepted(words: str) -> PolicyHash:
    return PolicyHash(dict.fromkeys(words.split(), _ACCEPT))


SMTP_REQUESTS = Preset(_accepted("HELO MAIL RCPT DATA RSET QUIT NOOP"))
SMTP_REPLIES = Preset(_replies(_SMTP_REPLIES))
ESMTP_REQUESTS = Preset(_accepted("EHLO AUTH ETRN STARTTLS"), SMTP_REQUESTS)
ESMTP_REPLIES = Preset(_replies(_ESMTP_REPLIES), SMTP_REPLIES)
ESMTP_EXTENSIONS = Preset(_accepted("PIPELINING SIZE ETRN AUTH 8BITMIME STARTTLS ENHANCEDSTATUSCODES"))
