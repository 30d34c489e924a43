"""A policy that runs in the test's own process, with clients that come from anywhere.

    with Gateway(POLICY, server_port=server.port) as gateway:
        client = gateway.connect(to=("192.0.2.80", 80), source="127.0.0.5")
        gateway.logged.wait_for("Server connection established")

The policy is text with $names, or the path of a file; it runs in empty registries
(test/support/world.py) and gets its instance function called as at start.  A client's
connection is a real TCP connection over loopback; `to` is where the policy believes it went,
as with an intercepted connection.  Without `to` it came to the first dispatcher's address.
Where the connection tracking of the host knows it to have gone is never asked.

gateway.seen is a dict that the policy may write to under the name SEEN.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import socket
import string
import sys
import textwrap
import threading
import time
import types
from unittest import mock

from test.support.logged import captured_log
from test.support.world import policy_world

DEADLINE_S = 10.0


class Gateway:
    """One policy in this process; use as context manager."""

    def __init__(self, policy, instance="gateway", **values):
        self._text = policy.read_text("utf-8") if isinstance(policy, pathlib.Path) else textwrap.dedent(policy)
        self._text = string.Template(self._text).safe_substitute(values)
        self._instance = instance
        self._stack = contextlib.ExitStack()
        self._clients = contextlib.ExitStack()
        self._threads = []
        self.seen = {}
        self.logged = None
        self.names = None
        self.policy = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.logged = stack.enter_context(captured_log())
            self.names = stack.enter_context(policy_world(zones=False))
            stack.enter_context(mock.patch("Zorp.acceptance.dispatch_table.original_destination", _no_tracking))
            self._stack = stack.pop_all()
        try:
            self._load()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *problem):
        self._clients.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self._wait_for_sessions()
        self._stack.close()

    def _wait_for_sessions(self):
        """Let every session end in its own world: its last lines belong to this test's log."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            started, ended = (len(self.logged.find(f"{word} proxy instance")) for word in ("Starting", "Ending"))
            if started <= ended:
                return
            time.sleep(0.005)

    def _load(self):
        self.policy = types.ModuleType("__main__")
        self.policy.__dict__.update(SEEN=self.seen)
        exec(compile(self._text, "policy.py", "exec", dont_inherit=True), self.policy.__dict__)
        mine = sys.modules["__main__"]
        sys.modules["__main__"] = self.policy
        try:
            init = getattr(self.policy, "init", importlib.import_module("Zorp.Zorp").init)
            with importlib.import_module("Zorp.acceptance.policy_load").loading([self._instance], self._instance):
                served = init([self._instance], self._instance, 1)
            if not served:
                raise AssertionError("the policy's init() refused: " + "; ".join(self.logged.texts("core.error")))
        finally:
            sys.modules["__main__"] = mine
        importlib.import_module("Zorp.Globals").parsing = True

    @property
    def chains(self):
        """The chains of the dispatch table, in order of registration."""
        return importlib.import_module("Zorp.Globals").dispatch_table.chains()

    def service(self, name):
        """Return a Service of the policy."""
        return importlib.import_module("Zorp.Globals").services[name]

    def connect(self, to=None, source="127.0.0.1", chain=0):
        """Return a client's socket; its other end has been given to a chain of the dispatch table.

        Arguments:
            to: (host, port) that the client wanted to reach; None: the dispatcher's own address.
            source: the address the client comes from, one of 127.0.0.0/8.
            chain: index into chains.
        """
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.socket()
            client.settimeout(DEADLINE_S)
            # the gateway is on this host too, and may want to use the client's address and port
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((source, 0))
            client.connect(listener.getsockname())
            accepted, peer = listener.accept()
        self._clients.callback(client.close)
        where = self.chains[chain]
        make = self.names["SockAddrInet"]
        local = where.bind.sa if to is None else make(*to)
        thread = threading.Thread(target=where.deliver, args=(accepted, make(*peer), local), daemon=True)
        self._threads.append(thread)
        thread.start()
        return client


def _no_tracking(sock, family):
    """In place of original_destination(): the sockets of connect() went to a listener that no policy knows."""


class Server:
    """A TCP server of a test: accepts, remembers who came, and answers with an echo or by a function.

    Arguments:
        serve: called with each accepted socket in a thread of its own; echoes when not given.
    """

    def __init__(self, serve=None, host="127.0.0.1", port=0, greeting=b""):
        self._serve = serve or self._echo
        self._greeting = greeting
        self._listener = socket.create_server((host, port))
        self.host, self.port = self._listener.getsockname()
        self.peers = []                    # (host, port) of every client, in order of arrival
        self._sockets = []
        self._arrived = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.close()

    def close(self):
        """Stop listening and end what is open."""
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def wait_for_peers(self, count, timeout_s=DEADLINE_S):
        """Return the peers as soon as there are so many."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.peers) >= count, timeout_s):
                raise AssertionError(f"{len(self.peers)} of {count} connections within {timeout_s} s")
            return list(self.peers)

    def _accept(self):
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return
            with self._arrived:
                self.peers.append(peer)
                self._sockets.append(sock)
                self._arrived.notify_all()
            threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock):
        with contextlib.suppress(OSError), sock:
            sock.sendall(self._greeting)
            self._serve(sock)

    @staticmethod
    def _echo(sock):
        while data := sock.recv(65536):
            sock.sendall(data)


def exchange(client, data=b"ping"):
    """Send bytes through a gateway to an echoing server and return what comes back."""
    client.sendall(data)
    answer = b""
    while len(answer) < len(data) and (part := client.recv(len(data) - len(answer))):
        answer += part
    return answer


def ended(client):
    """True when the gateway closed the client's connection without a byte."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
