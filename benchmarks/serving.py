"""A served system to measure through its HTTP endpoint: start it, stream from it, end it."""

import json
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import IO

import httpx

_TAIL_LINES = 60
_END_S = 60.0


@contextmanager
def served_system(options: Sequence[str] = ()) -> Iterator[tuple[str, float]]:
    """`diptych serve` with these options until the block ends: (base URL, seconds until ready).

    Raises:
        RuntimeError: it ended before it was ready; the message has the end of what it printed.
    """
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "diptych", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        for line in child.stdout:
            tail.append(line)
            if found := re.search(r"Ready after .* at (http://\S+)/v1", line):
                Thread(target=_show, args=(child.stdout,), daemon=True).start()
                yield found[1], time.perf_counter() - began
                return
        raise RuntimeError(f"diptych serve ended with {child.wait()}:\n{''.join(tail)}")
    finally:
        child.terminate()
        child.wait(_END_S)


def _show(output: IO[str]) -> None:
    for line in output:
        print(f"   serve: {line}", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Streamed:
    """One stream as the client saw it."""

    request_id: str
    times: list[float]
    """The moment of sending, then one per token, on `time.perf_counter`."""


async def stream(client: httpx.AsyncClient, prompt: Sequence[int], max_tokens: int) -> Streamed:
    """Complete `prompt`, greedily and to the full length.

    Raises:
        RuntimeError: fewer or more tokens came; httpx.HTTPError: the request failed.
    """
    body = {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        request_id = response.headers.get("x-request-id", "")
        async for line in response.aiter_lines():
            if line.startswith("data: {") and '"token_ids"' in line:
                tokens = json.loads(line[6:])["choices"][0]["token_ids"]
                times += [time.perf_counter()] * len(tokens)
    if len(times) != max_tokens + 1:
        raise RuntimeError(f"{len(times) - 1} of {max_tokens} tokens came")
    return Streamed(request_id, times)
