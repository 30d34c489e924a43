"""Between a socket and a session: binds, the table of dispatchers, verdicts, numbers, datagram sessions."""
