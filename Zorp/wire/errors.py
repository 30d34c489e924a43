"""The one exception of all parsers: a peer sent what its protocol forbids."""

from __future__ import annotations


class WireError(Exception):
    """Bytes that the grammar refuses.

    text    the fixed text for the log, with %-marks
    fields  what belongs into the marks: the peer's bytes as text, lengths, ...

    The message is for the log and never goes back to the peer as it is.  A parser that raised
    is spent: what follows on that connection has no known meaning.
    """

    def __init__(self, text: str, *fields) -> None:
        super().__init__(text, *fields)
        self.text, self.fields = text, fields

    def __str__(self) -> str:
        return self.text % self.fields
