"""What LineReader and parse_command make of bytes that come in pieces."""

from __future__ import annotations

from Zorp.wire.smtp_commands import Command, CommandError, parse_command
from Zorp.wire.smtp_lines import LineError, LineReader

LIMIT_BYTES = 200


def outcome(
    pieces: list[bytes], *, require_crlf: bool = True, utf8: bool = False
) -> tuple[list[Command | None], str | None]:
    """Return the commands, None for each refused line, and why the reader gave up, if it did."""
    lines = LineReader(require_crlf=require_crlf)
    commands: list[Command | None] = []
    try:
        for piece in pieces:
            lines.feed(piece)
            while (line := lines.next_line(LIMIT_BYTES)) is not None:
                commands.append(_parsed(line, utf8))
    except LineError as problem:
        return commands, str(problem)
    return commands, None


def _parsed(line: bytes, utf8: bool) -> Command | None:
    try:
        return parse_command(line, utf8=utf8)
    except CommandError:
        return None
