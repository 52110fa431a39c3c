"""Open-loop load on a served endpoint: requests come when they come, however busy it is.

Arrivals are made here (Poisson, or a trace), sent by several client processes
(`benchmarks.load_client`) so that reading many streams does not slow down what is measured, and
summed up here. Pure but for `run`.
"""

import asyncio
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

_SETTLE_S = 120.0
"""What streams have to end after the last arrival, beyond the time of the arrivals."""
_TRACE_BLOCK = 512
"""Tokens per hash id. Source: the Mooncake traces (FAST '25)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to be sent."""

    at_s: float
    """After the start."""
    prompt: Sequence[int]
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one."""

    at_s: float
    times: Sequence[float]
    """Of each token, seconds after it was to be sent."""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must meet to count as served well, in seconds."""

    ttft_s: float = 1.0
    tpot_s: float = 0.015
    itl_p99_s: float = 0.025


def poisson(
    *, rate: float, seconds: float, prompt_tokens: int, output_tokens: int, vocab: int, seed: int
) -> list[Arrival]:
    """Independent requests of one size."""
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        prompt = rng.choices(range(vocab), k=prompt_tokens)
        arrivals.append(Arrival(at_s=at_s, prompt=prompt, output_tokens=output_tokens))
        at_s += rng.expovariate(rate)
    return arrivals


def trace(
    path: Path, *, requests: int, longest: int, faster: float, vocab: int
) -> tuple[list[Arrival], int]:
    """The first requests of a trace of timestamps (ms), lengths and hash ids of prompt blocks.

    Equal hash ids become equal tokens, so prefixes are shared as they were.

    Args:
        path: of lines of JSON.
        requests: how many to take.
        longest: prompts of more tokens are left out.
        faster: divides the time between arrivals.
        vocab: token ids are below.

    Returns:
        The arrivals, and how many were left out on the way.
    """
    arrivals: list[Arrival] = []
    left_out = 0
    with path.open() as lines:
        for line in lines:
            if len(arrivals) == requests:
                break
            entry = json.loads(line)
            if entry["input_length"] > longest:
                left_out += 1
                continue
            prompt: list[int] = []
            for block in entry["hash_ids"]:
                prompt += random.Random(block).choices(range(vocab), k=_TRACE_BLOCK)
            arrivals.append(
                Arrival(
                    at_s=entry["timestamp"] / 1e3 / faster,
                    prompt=prompt[: entry["input_length"]],
                    output_tokens=max(2, entry["output_length"]),
                )
            )
    start = arrivals[0].at_s if arrivals else 0.0
    return [
        Arrival(at_s=each.at_s - start, prompt=each.prompt, output_tokens=each.output_tokens)
        for each in arrivals
    ], left_out


async def run(
    urls: Sequence[str], arrivals: Sequence[Arrival], *, clients: int = 4
) -> list[Outcome]:
    """Send all arrivals in their own time, and wait for what comes of them.

    Args:
        urls: where to, in turn.
        arrivals: what and when.
        clients: processes that send; a multiple of the number of URLs.

    Raises:
        RuntimeError: a client process failed.
    """
    shares = [arrivals[number::clients] for number in range(clients)]
    found = await asyncio.gather(
        *(_client(urls[i % len(urls)], share) for i, share in enumerate(shares) if share)
    )
    return sorted((each for part in found for each in part), key=lambda each: each.at_s)


async def _client(url: str, arrivals: Sequence[Arrival]) -> list[Outcome]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.load_client", url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    work = json.dumps([asdict(each) for each in arrivals]).encode()
    try:
        limit_s = arrivals[-1].at_s + _SETTLE_S
        output, _ = await asyncio.wait_for(child.communicate(work), limit_s)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise RuntimeError(f"a client ended with {child.returncode}")
    return [Outcome(**each) for each in json.loads(output)]


def summary(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    """Numbers of one run; times in milliseconds, goodput in requests per second.

    Throughput counts from the first arrival to the last token. A request that failed is not good,
    and has no part in the times.
    """
    done = [each for each in outcomes if not each.error and len(each.times) > 1]
    if not done:
        return {"requests": len(outcomes), "failed": len(outcomes)}
    begin = min(each.at_s for each in outcomes)
    span = max(each.at_s + each.times[-1] for each in done) - begin
    ttft = [each.times[0] for each in done]
    tpot = [(each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in done]
    gaps = [[later - sooner for sooner, later in pairwise(each.times)] for each in done]
    good = sum(
        first <= slo.ttft_s and mean <= slo.tpot_s and percentile(each, 99) <= slo.itl_p99_s
        for first, mean, each in zip(ttft, tpot, gaps, strict=True)
    )
    every_gap = [gap for each in gaps for gap in each]
    figures: dict[str, Any] = {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(done),
        "output_tokens_per_s": sum(len(each.times) for each in done) / span,
        "good_share": good / len(outcomes),
        "goodput": good / span,
    }
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", every_gap)):
        figures |= {f"{name}_p{p}_ms": 1e3 * percentile(values, p) for p in (50, 99)}
    return figures


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
