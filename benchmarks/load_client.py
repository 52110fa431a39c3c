"""One client process of `benchmarks.load`: arrivals as JSON on standard input, outcomes on output.

python -m benchmarks.load_client URL
"""

import asyncio
import json
import sys
import time
from typing import Any

import httpx

from benchmarks.serving import stream

_START_S = 1.0
"""From here to the moment that arrivals count from, so that all clients are ready by then."""


async def send(client: httpx.AsyncClient, begin: float, arrival: dict[str, Any]) -> dict[str, Any]:
    """Wait for its time, send it, and note when each token came."""
    due = begin + arrival["at_s"]
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    times: list[float] = []
    error = ""
    try:
        streamed = await stream(client, arrival["prompt"], arrival["output_tokens"])
        times = [moment - due for moment in streamed.times[1:]]
    except (httpx.HTTPError, RuntimeError) as failure:
        error = repr(failure)
    return {"at_s": arrival["at_s"], "times": times, "error": error}


async def main() -> None:
    """Send everything and write what came of it."""
    arrivals = json.loads(sys.stdin.read())
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=sys.argv[1], timeout=300, limits=limits) as client:
        begin = time.perf_counter() + _START_S
        found = await asyncio.gather(*(send(client, begin, arrival) for arrival in arrivals))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
