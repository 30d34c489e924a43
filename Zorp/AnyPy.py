"""AnyPy: a proxy whose protocol the policy itself speaks, in Python.

    class Shout(AnyPyProxy):
        def proxyThread(self):
            while TRUE:
                self.server_stream.write(self.client_stream.readline().upper() + "\\r\\n")

Theory of operation
    The server is connected first, then both streams get a line reader, then proxyThread() runs
    once.  When it returns or raises, the session ends; an exception is logged.

    There is no time limit but those of the streams.  A stop request wakes a blocked read() or
    readline() with end of file, and the exception that follows is not worth a log line.
"""

from __future__ import annotations

from Zorp.Constants import CORE_DEBUG
from Zorp.engine.attributes import INT, METHOD, RUN_READ, Attr
from Zorp.language import star_names
from Zorp.Proxy import Proxy
from Zorp.stacking.stacking import StackingFailed, stack_object
from Zorp.Stream import StreamException

ANYPY_UNSPEC = 0
ANYPY_ACCEPT = 1
ANYPY_DENY = 2
ANYPY_REJECT = 3
ANYPY_ABORT = 4
ANYPY_DROP = 5
ANYPY_POLICY = 6
ANYPY_ERROR = 7

_ERROR_TAG = "anypy.error"


class AbstractAnyPyProxy(Proxy):
    """The engine of AnyPy with its attributes; derive from it and write proxyThread()."""

    name = "anypy"
    engine_attributes = (
        Attr("client_max_line_length", INT, default=4096),         # bytes, with the line end
        Attr("server_max_line_length", INT, default=4096),
        Attr("set_verdict", METHOD, RUN_READ, "_set_content_verdict"),
        Attr("set_content_hint", METHOD, RUN_READ, "_set_content_hint"),
        Attr("stack", METHOD, RUN_READ, "_stack"),
    )

    def proxyThread(self):
        """Be the proxy: read from and write to client_stream and server_stream."""
        raise NotImplementedError

    def connectServer(self, *hint):
        """Return the server's stream, connecting only when there is none; see Proxy.connectServer()."""
        if self._server is not None and self._server.fileno() >= 0:
            return self._server
        return super().connectServer(*hint)

    def _engine_main(self):
        if not self._connect_server():
            return
        if self._client is None or self._server is None:
            self._log(_ERROR_TAG, 2, "Server side not yet connected, unable to init streams;")
            return
        self._client.push_lines(self._vars.client_max_line_length)
        self._server.push_lines(self._vars.server_max_line_length)
        self._call_policy(self._proxy_thread)

    def _proxy_thread(self):
        try:
            self.proxyThread()
        except (StreamException, OSError):
            if not self.stop_requested:
                raise

    def _set_content_verdict(self, *arguments):
        """Tell the parent proxy what to do with the content; nobody listens unless this proxy is stacked."""
        if len(arguments) != 2 or not isinstance(arguments[0], int) or not isinstance(arguments[1], str):
            raise ValueError("Invalid arguments.")
        if self._parent is None:
            self._log(CORE_DEBUG, 6, "Verdict ignored, no parent proxy; verdict='%d', description='%s'", arguments)
        else:
            self._parent.child_judged(self._client, *arguments)

    def _set_content_hint(self, *arguments):
        """Announce the length of the output to the parent proxy; nobody listens unless this proxy is stacked."""
        if len(arguments) != 1 or not isinstance(arguments[0], int):
            raise ValueError("Invalid arguments.")
        if self._parent is not None:
            self._parent.child_announced(self._client, *arguments)

    def _stack(self, *arguments):
        """Start what the arguments describe: a stack form, or its items; raises RuntimeError.

        Return (client stream, server stream), our ends of what was stacked; it ends with proxyThread().
        """
        try:
            stacked = stack_object(self, arguments[0] if len(arguments) == 1 else arguments)
        except StackingFailed as problem:
            raise RuntimeError("Stacking failed.") from problem
        return stacked.client, stacked.server


class AnyPyProxy(AbstractAnyPyProxy):
    """The class that policies derive from."""


star_names.complete(__name__)
