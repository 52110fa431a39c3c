"""One client process: `python -m diptych.bench.client`, started by `diptych.bench.load` alone.

A job comes as one line of JSON on standard input (so that no key is in a command line), `ready`
goes back, the moment of the start follows, and at last one line with what came of it. If standard
input ends sooner the parent is gone, and so is the load.
"""

import asyncio
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import orjson

from diptych.bench.arrivals import Arrival, Lengths, Sizes
from diptych.bench.jobs import Job, Target
from diptych.bench.prompts import Prompts
from diptych.bench.streaming import Asked, Outcome, ask

_AHEAD, _AHEAD_BYTES = 512, 64 << 20
"""Requests written before they are due, so that writing them makes none of them late."""
_FILES = 10_240
"""Connections of one process; more than some systems allow for is refused by those."""
_TICK_S = 0.01


def job_of(data: Mapping[str, Any]) -> Job:
    """A job as it came over the pipe."""
    parts = dict(data)
    if sizes := data["sizes"]:
        lengths = {name: Lengths(**sizes[name]) for name in ("prompt", "output")}
        parts["sizes"] = Sizes(**sizes | lengths)
    parts["target"] = Target(**data["target"])
    parts["prompts"] = Prompts(**data["prompts"])
    for name in ("arrivals", "warmup"):
        parts[name] = [Arrival(**each) for each in data[name]]
    return Job(**parts)


@dataclass(slots=True)
class Clock:
    """How late this process itself gets to run; seconds."""

    worst_s: float = 0.0

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            due = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.worst_s = max(self.worst_s, time.monotonic() - due)


class Written:
    """Requests in their order, written some way ahead of the moment that they are due."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._arrivals = _arrivals(job)
        self._ready: deque[tuple[Arrival, Asked]] = deque()
        self._bytes = 0
        self._fill()

    def __iter__(self) -> "Written":
        return self

    def __next__(self) -> tuple[Arrival, Asked]:
        if not self._ready:
            raise StopIteration
        arrival, asked = self._ready.popleft()
        self._bytes -= len(asked.body)
        self._fill()
        return arrival, asked

    def _fill(self) -> None:
        while len(self._ready) < _AHEAD and self._bytes < _AHEAD_BYTES:
            arrival = next(self._arrivals, None)
            if arrival is None:
                return
            asked = self._job.asked(arrival)
            self._ready.append((arrival, asked))
            self._bytes += len(asked.body)


def _arrivals(job: Job) -> Iterator[Arrival]:
    if job.sizes is None:
        return iter(job.arrivals)
    return job.sizes.endless(job.share, job.shares)


async def open_loop(http: httpx.AsyncClient, written: Written, begin: float) -> list[Outcome]:
    """Send each request when it is due, whatever became of those before."""
    sent: list[asyncio.Task[Outcome]] = []
    async with asyncio.TaskGroup() as tasks:
        for arrival, asked in written:
            due = begin + arrival.at_s
            await asyncio.sleep(due - time.monotonic())
            sent.append(
                tasks.create_task(ask(http, asked, number=arrival.number, due=due, begin=begin))
            )
    return [task.result() for task in sent]


async def closed_loop(
    http: httpx.AsyncClient, written: Written, job: Job, begin: float
) -> list[Outcome]:
    """Keep so many requests under way: the next one is sent when one has ended."""
    outcomes: list[Outcome] = []

    async def lane() -> None:
        await asyncio.sleep(begin - time.monotonic())
        for arrival, asked in written:
            due = time.monotonic()
            if job.until_s is not None and due - begin >= job.until_s:
                return
            outcomes.append(await ask(http, asked, number=arrival.number, due=due, begin=begin))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(job.concurrency):
            tasks.create_task(lane())
    return outcomes


async def run(job: Job) -> None:
    """Warm up, say so, wait for the start, send everything, say what came of it."""
    async with job.target.client() as http:
        written = Written(job)
        now = time.monotonic()
        await asyncio.gather(*(ask(http, job.asked(one), due=now, begin=now) for one in job.warmup))
        print("ready", flush=True)
        begin = float(await asyncio.to_thread(sys.stdin.readline))
        # A load that nobody waits for any more must not go on.
        threading.Thread(target=_end_with_parent, daemon=True).start()
        clock = Clock()
        watch = asyncio.create_task(clock.watch())
        try:
            if job.concurrency:
                outcomes = await closed_loop(http, written, job, begin)
            else:
                outcomes = await open_loop(http, written, begin)
        finally:
            watch.cancel()
    found = {"outcomes": [asdict(each) for each in outcomes], "stall_s": clock.worst_s}
    sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    # Not through sys.stdin: its lock, held here, would be in the way of a regular end.
    if not os.read(0, 1):
        os._exit(1)


def main() -> None:
    """Do one job."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY:
        wanted = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))
    asyncio.run(run(job_of(orjson.loads(sys.stdin.readline()))))


if __name__ == "__main__":
    main()
