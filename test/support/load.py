"""A steady stream of connections through a daemon, every byte of which is checked.

    with Load(daemon, per_second=220) as load:          # the policy is load.POLICY, see policy_values()
        session = load.long()                           # one that lasts, besides the short ones
        ...
        load.finish()                                   # no new ones; wait until the short ones are done
    assert load.failures == []

Connections begin at their rate whatever becomes of those before (an open loop), so a daemon that stalls
is found.  Half of them go through a Plug to an echo server and compare every byte; half speak with an
AnyPy that tells the word of its policy and its process.  Everything runs in one thread of its own;
the lists may be read at any time.
"""

from __future__ import annotations

import asyncio
import collections
import random
import threading
import time
from typing import NamedTuple

from test.support.daemon import wait_until
from test.support.ports import free_port

POLICY = '''
from Zorp.Core import *
from Zorp.AnyPy import *
from Zorp.Plug import *
import os

WORD = "$word"

Zone("everywhere", ["0.0.0.0/0"])

class Word(AnyPyProxy):
    """Says its word, and again for every line of the client."""

    def proxyThread(self):
        try:
            while TRUE:
                self.client_stream.write("%s %d\\n" % (WORD, os.getpid()))
                self.client_stream.readline()
        except Exception:
            pass                        # the client has gone

def $name():
    origin = SockAddrInet("127.0.0.1", $origin)
    Service("plug", PlugProxy, router=DirectedRouter(origin))
    Service("word", Word, router=DirectedRouter(origin))
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug", backlog=1024)
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $word_port), ZD_PROTO_TCP), service="word", backlog=1024)
'''

_SESSION_DEADLINE_S = 20.0
_LARGEST_BYTES = 40_000
_LONG_PAUSE_S = 0.05


class Failure(NamedTuple):
    """A connection that was not served as it should have been."""

    kind: str                    # "short" or "long", and what it did
    problem: str
    at_s: float                  # time.monotonic()
    pid: int | None              # the process that served it, where it says so


class Answer(NamedTuple):
    """What a short session with the AnyPy learned."""

    began_s: float               # time.monotonic() before it connected
    word: str
    pid: int


class Long:
    """A session that lasts until it is told to end; words is every word it was given."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.pid: int | None = None
        self.echoed_bytes = 0
        self.ending = False
        self.failed = False


class Echo:
    """The server behind the firewall; for the loop of the load."""

    def __init__(self) -> None:
        self.port = free_port()

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_server(self._echo, "127.0.0.1", self.port, backlog=1024)

    @staticmethod
    async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass                     # a worker that was killed
        finally:
            writer.close()


class Load:
    """See the module's text."""

    def __init__(self, per_second: int = 220) -> None:
        self._pause_s = 1 / per_second
        self._echo = Echo()
        self._random = random.Random(1)
        self._pacing = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task] = set()
        self._running: collections.Counter[str] = collections.Counter()
        self.longs: list[Long] = []
        self.failures: list[Failure] = []
        self.answers: list[Answer] = []
        self.begun = 0               # short connections begun
        self.served = 0              # connections that were served to their end

    def policy_values(self) -> dict[str, int]:
        """Values for $origin, $port and $word_port of POLICY."""
        self.port, self.word_port = free_port(), free_port()
        return {"origin": self._echo.port, "port": self.port, "word_port": self.word_port}

    def __enter__(self) -> Load:
        self._thread.start()
        self._call(self._echo.serve())
        return self

    def begin(self) -> None:
        """Begin with the short connections; the daemon serves."""
        self._pacing.set()
        self._began_s = time.monotonic()
        self._loop.call_soon_threadsafe(self._keep, self._pace())

    def long(self) -> Long:
        """Begin a session that lasts, once as words and once as bytes; return when it is served."""
        session = Long()
        self.longs.append(session)
        for job in (self._long_words(session), self._long_bytes(session)):
            self._loop.call_soon_threadsafe(self._keep, self._watched("long", job, session))
        wait_until(lambda: session.failed or (session.words and session.echoed_bytes), "a long session")
        return session

    @property
    def in_flight(self) -> int:
        """Connections that have begun and not ended."""
        return sum(self._running.values())

    def finish(self) -> None:
        """Stop beginning, wait for the short sessions, then end the long ones."""
        self._pacing.clear()
        self.per_second = self.begun / (time.monotonic() - self._began_s)
        wait_until(lambda: not self._running["short"], "the end of the short sessions", _SESSION_DEADLINE_S + 5)
        for session in self.longs:
            session.ending = True
        wait_until(lambda: not self._running["long"], "the end of the long sessions", _SESSION_DEADLINE_S + 5)

    def __exit__(self, *exc_info) -> None:
        self._pacing.clear()
        self._call(self._cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _cancel(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _call(self, job):
        return asyncio.run_coroutine_threadsafe(job, self._loop).result(10)

    def _keep(self, job) -> None:
        """Run a job; the loop alone would not keep its task from being collected."""
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pace(self) -> None:
        due = time.monotonic()
        while self._pacing.is_set():
            job = self._short_bytes() if self.begun % 2 else self._short_words()
            self.begun += 1
            self._running["short"] += 1      # before the task runs: finish() must not miss it
            self._keep(self._watched("short", job, None))
            due += self._pause_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _watched(self, kind: str, job, session: Long | None) -> None:
        if session is not None:
            self._running[kind] += 1
        try:
            await job if session is not None else await asyncio.wait_for(job, _SESSION_DEADLINE_S)
            self.served += 1
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.TimeoutError) as problem:
            if session is not None:
                session.failed = True
            says_pid = session is not None and job.__name__ == "_long_words"
            self.failures.append(Failure(f"{kind} {job.__name__}", repr(problem), time.monotonic(),
                                         session.pid if says_pid else None))
        finally:
            self._running[kind] -= 1

    async def _exchange(self, reader, writer, data: bytes) -> None:
        writer.write(data)
        if await reader.readexactly(len(data)) != data:
            raise ValueError("other bytes came back")

    async def _short_bytes(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            await self._exchange(reader, writer, self._random.randbytes(self._random.randint(1, _LARGEST_BYTES)))
        finally:
            writer.close()

    async def _short_words(self) -> None:
        began_s = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.word_port)
        try:
            word, pid = (await reader.readuntil(b"\n")).split()
            self.answers.append(Answer(began_s, word.decode(), int(pid)))
        finally:
            writer.close()

    async def _long_words(self, session: Long) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.word_port)
        try:
            while not session.ending:
                word, pid = (await reader.readuntil(b"\n")).split()
                session.words.append(word.decode())
                session.pid = int(pid)
                await asyncio.sleep(_LONG_PAUSE_S)
                writer.write(b"more\n")
        finally:
            writer.close()

    async def _long_bytes(self, session: Long) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            while not session.ending:
                data = self._random.randbytes(4096)
                await self._exchange(reader, writer, data)
                session.echoed_bytes += len(data)
                await asyncio.sleep(_LONG_PAUSE_S)
        finally:
            writer.close()
