"""What a ReplyReader makes of bytes that come in pieces."""

from __future__ import annotations

from Zorp.wire.errors import WireError
from Zorp.wire.limits import SmtpLimits
from Zorp.wire.smtp_lines import LineReader
from Zorp.wire.smtp_replies import Reply, ReplyReader

LIMITS = SmtpLimits(line_bytes=600, reply_lines=10, reply_bytes=2000)


def outcome(pieces: list[bytes], limits: SmtpLimits = LIMITS, **options) -> tuple[list[Reply], str | None]:
    """Return the replies and, when the reader gave up, why."""
    lines = LineReader()
    reader = ReplyReader(lines, limits, **options)
    replies = []
    try:
        for piece in pieces:
            reply = reader.reply_in(piece)
            while reply is not None:
                replies.append(reply)
                reply = reader.next_reply()
    except WireError as problem:
        return replies, str(problem)
    return replies, None
