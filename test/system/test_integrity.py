"""Every byte arrives, once and in its place: checksums at both ends of a Plug, in both directions at once."""

from __future__ import annotations

import random
import threading

import pytest

from test.support.daemon import wait_until
from test.support.transfers import Origin, Transfer
from Zorp.transport.pipes import PIPE_BYTES
from Zorp.transport.relay import LONG_BYTES

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("all", ["0.0.0.0/0"])

    class Soft(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            self.shutdown_soft = TRUE

    def intra():
        Service("plug", Soft, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
    """
EDGES = sorted({0, 1, 2, *(size * times + step for size in (LONG_BYTES, PIPE_BYTES) for times in (1, 2, 16)
                           for step in (-1, 0, 1))})


@pytest.fixture
def origin():
    with Origin() as running:
        yield running


@pytest.fixture
def plug(zorp, origin):
    return zorp(POLICY, verbosity=4, server_port=origin.port)


def run_all(port, transfers, parallel):
    """Run transfers in so many threads; return what went wrong."""
    waiting, failures = list(reversed(transfers)), []

    def work():
        while waiting and not failures:
            try:
                transfer = waiting.pop()
            except IndexError:
                return
            try:
                transfer.run(port)
            except (OSError, AssertionError) as problem:
                failures.append((transfer, problem))

    threads = [threading.Thread(target=work) for _ in range(parallel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.parametrize("each_way", [
    pytest.param(100_000_000, id="200 MB"),
    pytest.param(5_000_000_000, id="10 GB", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
])
def test_one_large_transfer_in_both_directions(plug, origin, each_way):
    Transfer(7, each_way, each_way).run(plug.port)
    origin.check()
    # the log knows how much it was
    plug.log.wait_for("core.summary", 4, "Connection summary")
    counts = sorted((int(line.fields["sent"]), int(line.fields["received"]))
                    for line in plug.log.find("core.accounting", 4, "accounting info"))
    header = len(f"7 {each_way} {each_way}\n")
    assert counts == [(each_way, each_way + header), (each_way + header, each_way)]


@pytest.mark.parametrize("number", [
    pytest.param(100, id="100"), pytest.param(1000, id="1000", marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_many_transfers_that_half_close_at_any_time(plug, origin, number):
    # given sizes that end one side long before the other, cut into sends of any size
    chance = random.Random(number)
    transfers = [Transfer(seed * 2, *(chance.choice((chance.choice(EDGES), chance.randrange(1_500_000)))
                                      for _ in range(2)), chance.choice((1000, 70_000, 1 << 20)))
                 for seed in range(number)]
    assert run_all(plug.port, transfers, 8) == []
    origin.check()
    plug.log.wait_for("core.summary", 4, "Connection summary", count=number, timeout_s=30)
    assert len(plug.log.find("core.summary", 4, "Connection summary", verdict="ACCEPTED")) == number


def test_every_size_around_the_thresholds(plug, origin):
    transfers = [Transfer(100 + 2 * index, size, EDGES[-1 - index]) for index, size in enumerate(EDGES)]
    assert run_all(plug.port, transfers, 4) == []
    origin.check()


def test_bytes_written_one_by_one(plug, origin):
    Transfer(3, 3000, 10, cut=1).run(plug.port)
    origin.check()


def test_a_transfer_outlives_the_reload_in_its_middle(plug, origin):
    # given a transfer in its middle
    half_sent, reloaded = threading.Event(), threading.Event()
    failures = []

    def before_piece(number):
        if number == 50:
            half_sent.set()
            assert reloaded.wait(60)

    def run():
        try:
            Transfer(5, 20_000_000, 20_000_000, cut=400_000).run(plug.port, before_piece)
        except (OSError, AssertionError) as problem:
            failures.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    assert half_sent.wait(60)
    # when the policy is reloaded, twice, and other transfers begin
    for number in range(2):
        plug.reload()
        assert run_all(plug.port, [Transfer(50 + 2 * number, 100_000, 200_000)], 1) == []
    reloaded.set()
    # then it arrives whole
    thread.join()
    assert failures == []
    origin.check()
    wait_until(lambda: len(plug.log.find("core.summary", 4, "Connection summary")) == 3, "the summaries")
