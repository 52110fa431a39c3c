"""Load by several client processes, so that reading many streams does not slow what is measured.

Called by `diptych bench` and by the benchmarks of this repository. All clients start at one moment,
when every one of them is ready.
"""

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from core.errors import UnavailableError
from diptych.bench.arrivals import Arrival, Sizes
from diptych.bench.jobs import Job, Target
from diptych.bench.prompts import Prompts
from diptych.bench.streaming import Outcome

_READY_S = 60.0
"""What a client has to import and to write its first requests, beside its warm-up."""
_TOGETHER_S = 0.1
"""From the word to start to the start, so that it has reached all clients."""
_REPORT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What came of a load."""

    outcomes: Sequence[Outcome]
    """In the order in which they were due."""
    stall_s: float
    """The longest that a client process did not get to run, in seconds."""


def shared(
    targets: Sequence[Target],
    prompts: Prompts,
    arrivals: Sequence[Arrival],
    *,
    clients: int,
    concurrency: int = 0,
    until_s: float | None = None,
    sizes: Sizes | None = None,
    warmup: Sequence[Arrival] = (),
) -> list[Job]:
    """A load, divided among client processes.

    Args:
        targets: endpoints, taken in turn by the clients.
        prompts: how prompts are made.
        arrivals: all requests; none with `sizes`.
        clients: processes; fewer if there is too little to do for so many.
        concurrency: requests under way in a closed loop; 0: an open loop.
        until_s: end of a closed loop.
        sizes: requests without end instead, until then.
        warmup: requests that are sent first and not counted.
    """
    most = min(clients, concurrency or clients, len(arrivals) if sizes is None else clients)
    return [
        Job(
            target=targets[share % len(targets)],
            prompts=prompts,
            arrivals=arrivals[share::most],
            sizes=sizes,
            share=share,
            shares=most,
            concurrency=concurrency // most + (share < concurrency % most),
            until_s=until_s,
            warmup=warmup[share::most],
        )
        for share in range(most)
    ]


async def run(jobs: Sequence[Job]) -> Loaded:
    """Do all jobs, each in a process of its own.

    Raises:
        UnavailableError: a client process failed, or is not through in time.
    """
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_client(job)) for job in jobs]
        try:
            async with asyncio.timeout(_READY_S + max(job.target.timeout_s for job in jobs)):
                await asyncio.gather(*map(_ready, clients))
            begin = time.monotonic() + _TOGETHER_S
            for client in clients:
                assert client.stdin is not None
                client.stdin.write(f"{begin!r}\n".encode())
            async with asyncio.timeout(max(job.limit_s for job in jobs) + _REPORT_S):
                found = await asyncio.gather(*map(_report, clients))
        except TimeoutError:
            raise UnavailableError("A client process is not through in time.") from None
    outcomes = [Outcome(**each) for part in found for each in part["outcomes"]]
    return Loaded(
        outcomes=sorted(outcomes, key=lambda each: (each.due_s, each.number)),
        stall_s=max(part["stall_s"] for part in found),
    )


@asynccontextmanager
async def _client(job: Job) -> AsyncIterator[Process]:
    # A session of its own: Ctrl-C is for the parent, which then ends it.
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "diptych.bench.client"),
        stdin=PIPE,
        stdout=PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdin is not None
        child.stdin.write(orjson.dumps(asdict(job)) + b"\n")
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def _ready(client: Process) -> None:
    assert client.stdout is not None
    if await client.stdout.readline() != b"ready\n":
        raise UnavailableError(f"A client process ended with {await client.wait()}.")


async def _report(client: Process) -> dict[str, Any]:
    assert client.stdout is not None
    said = await client.stdout.read()
    if await client.wait() or not said:
        raise UnavailableError(f"A client process ended with {client.returncode}.")
    found: dict[str, Any] = orjson.loads(said)
    return found
