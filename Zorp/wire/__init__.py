"""Protocol grammar: bytes to values and back.

Nothing here knows sockets, threads, clocks, policies or logs, so the same parsers serve the
proxies, the tests and the tools.  Every parser is incremental where its input may come in
pieces, bounded by numbers of Zorp.wire.limits, and raises WireError and nothing else.
"""
