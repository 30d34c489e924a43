"""The engine of the SMTP proxy: what happens between the two sockets.

Theory of operation
    One thread, lock step: a request line in, checked and rewritten, a request line out; a reply
    in, checked, a reply out.  The proxy holds no queue and acknowledges only what the server
    acknowledged.

    session       the facts that everything shares, and the replies the proxy gives in its own name
    sides         the two connections as lines, replies and blocks
    decisions     what the policy's tables and callbacks say to a request, a reply, an extension
    commands      what each verb needs before it is forwarded and after it is answered
    authentication  the SASL dialogue
    transfer      DATA and BDAT
    inspection    DATA through a stacked proxy or program
    received      the Received line
    dialogue      the loop: greeting, commands, the end

    Zorp.wire knows the grammar; Zorp.Smtp is what policies see.

What comes later has its place
    commands.Commands.do_STARTTLS() where the sides get TLS streams (sides take any Stream).

Guarantees
    The server never sees an end of data, a command or a reply boundary that the proxy did not
    see.  When proxy and server may disagree about where they are, the transaction is reset or the
    session ends; nothing goes on blindly.
"""
