"""What tells a worker to stop, and what to hurry."""

import asyncio
import signal

import pytest

from worker.stopping import StopRequests

SOON_S = 5.0


@pytest.mark.parametrize("by_node", [False, True])
async def test_a_second_signal_hurries_but_not_the_first_after_a_node_asked(by_node: bool) -> None:
    signals: asyncio.Queue[int] = asyncio.Queue()
    stopping = asyncio.Event()
    told = StopRequests(signals, stopping)
    wait = asyncio.create_task(told.wait())
    await asyncio.sleep(0)
    assert not wait.done()
    if by_node:
        stopping.set()
    else:
        signals.put_nowait(signal.SIGTERM)
        stopping.set()  # a node may ask as well: it hurries nothing
    async with asyncio.timeout(SOON_S):
        await wait
    if by_node:
        signals.put_nowait(signal.SIGTERM)  # the one that all nodes get
    again = asyncio.create_task(told.again())
    await asyncio.wait({again}, timeout=0.05)
    assert not again.done()
    signals.put_nowait(signal.SIGTERM)
    async with asyncio.timeout(SOON_S):
        await again


async def test_a_worker_of_one_node_hears_signals_alone() -> None:
    signals: asyncio.Queue[int] = asyncio.Queue()
    told = StopRequests(signals, None)
    signals.put_nowait(signal.SIGINT)
    async with asyncio.timeout(SOON_S):
        await told.wait()
