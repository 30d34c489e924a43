"""The whole engine between a client that sends anything and a server that keeps its own books."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.smtp_dialogue import PIECES, one_input
from test.smtp.two_ends import talk


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=6)).map(b"".join))
def test_any_bytes(data):
    one_input(data)


def test_the_books_of_the_server_are_kept():
    # given a client that sends a mail, and one that is for somebody else
    data = b"EHLO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<a@evil>\r\nRCPT TO:<a@ok.example>\r\nNOOP\r\n"
    # then what reached the server is what the proxy let through
    server, answered = talk(data)
    assert server.commands[0] == b"EHLO a\r\n"
    assert not [line for line in server.commands if b"evil" in line]
    assert answered.startswith(b"220 mx\r\n250-")
