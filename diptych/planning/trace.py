"""Requests for the planner and the placement simulator, from a public trace or from plain numbers.

Two forms of trace are read. JSON lines as published with Mooncake (kvcache-ai/Mooncake,
FAST25-release): `timestamp` in ms, `input_length` and `output_length` in tokens, `hash_ids` with
one id for each block of 512 prompt tokens, equal ids for equal prefixes; these may be missing. And
CSV as published by Azure (Azure/AzurePublicDataset, 2023): `TIMESTAMP`, `ContextTokens`,
`GeneratedTokens`.
"""

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import xxhash

from core.errors import ConfigError

BLOCK_SIZE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """One request; times in seconds from the start."""

    arrives_at: float
    prompt_tokens: int
    output_tokens: int
    hashes: Sequence[bytes] = ()
    """Of the prompt's full blocks, as far as known."""


def read_trace(path: Path) -> list[TracedRequest]:
    """All requests of a file, in the order of their arrival, the first one at 0.

    Raises:
        ConfigError: it can't be read, or is in neither form; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The trace {path} can't be read: {error}") from None
    read = _mooncake if lines and lines[0].lstrip().startswith("{") else _azure
    requests: list[TracedRequest] = []
    rows = read(lines)
    while True:
        try:
            requests.append(next(rows))
        except StopIteration:
            break
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: request {len(requests) + 1} is neither in Mooncake's form (JSON lines "
                "with timestamp, input_length, output_length) nor in Azure's (CSV with TIMESTAMP, "
                f"ContextTokens, GeneratedTokens): {error!r}."
            ) from None
    if not requests:
        raise ConfigError(f"The trace {path} holds no requests.")
    requests.sort(key=lambda request: request.arrives_at)
    return shifted(requests, -requests[0].arrives_at)


def _mooncake(lines: Iterable[str]) -> Iterator[TracedRequest]:
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        full = row["input_length"] // BLOCK_SIZE
        yield TracedRequest(
            arrives_at=row["timestamp"] / 1e3,
            prompt_tokens=max(1, row["input_length"]),
            output_tokens=max(1, row["output_length"]),
            hashes=[_hash(0, block) for block in row.get("hash_ids", ())[:full]],
        )


def _azure(lines: Iterable[str]) -> Iterator[TracedRequest]:
    for row in csv.DictReader(lines):
        # Fractions have seven digits there, one more than Python takes.
        when = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
        yield TracedRequest(
            arrives_at=(when - datetime(2000, 1, 1, tzinfo=when.tzinfo)).total_seconds(),
            prompt_tokens=max(1, int(row["ContextTokens"])),
            output_tokens=max(1, int(row["GeneratedTokens"])),
        )


def shifted(requests: Iterable[TracedRequest], by_s: float) -> list[TracedRequest]:
    """The same requests, so much later."""
    return [replace(each, arrives_at=each.arrives_at + by_s) for each in requests]


def faster(requests: Iterable[TracedRequest], factor: float) -> list[TracedRequest]:
    """The same requests in a shorter time: `factor` times the load."""
    return [replace(each, arrives_at=each.arrives_at / factor) for each in requests]


def made_up(
    *,
    rate: float,
    prompt_tokens: float,
    output_tokens: float,
    spread: float,
    count: int,
    seed: int = 0,
) -> list[TracedRequest]:
    """Requests that arrive by chance, with lengths drawn from a lognormal distribution.

    Args:
        rate: requests per second, on average.
        prompt_tokens: mean length of prompts.
        output_tokens: mean length of outputs.
        spread: standard deviation of lengths over their mean; 0: all alike.
        count: requests.
        seed: of the chance.
    """
    chance = random.Random(seed)
    sigma = math.sqrt(math.log1p(spread**2))

    def length(mean: float) -> int:
        return max(1, round(mean * math.exp(chance.gauss(-(sigma**2) / 2, sigma))))

    requests, at = [], 0.0
    for _ in range(count):
        requests.append(
            TracedRequest(
                arrives_at=at,
                prompt_tokens=length(prompt_tokens),
                output_tokens=length(output_tokens),
            )
        )
        at += chance.expovariate(rate)
    return requests


def overlay(
    requests: Sequence[TracedRequest], *, copies: int, window_s: float, speed: float
) -> list[TracedRequest]:
    """Traffic for a larger fleet: windows of the trace at the same time, sharing no blocks.

    Args:
        requests: a whole trace.
        copies: windows, which begin at equal distances over the trace.
        window_s: length of each, in seconds of the trace.
        speed: seconds of the trace that pass in one second.
    """
    length_s = requests[-1].arrives_at + 1e-3
    chosen = []
    for copy in range(copies):
        begins_at = copy * length_s / copies
        for request in requests:
            # A window that would reach over the end goes on at the beginning.
            since_s = (request.arrives_at - begins_at) % length_s
            if since_s < window_s:
                chosen.append(
                    TracedRequest(
                        arrives_at=since_s / speed,
                        prompt_tokens=request.prompt_tokens,
                        output_tokens=request.output_tokens,
                        hashes=[_salted(copy, block) for block in request.hashes]
                        if copy
                        else request.hashes,
                    )
                )
    return sorted(chosen, key=lambda request: request.arrives_at)


def _hash(copy: int, block: int) -> bytes:
    return xxhash.xxh3_128_digest(copy.to_bytes(8, "little") + block.to_bytes(8, "little"))


def _salted(copy: int, block: bytes) -> bytes:
    return xxhash.xxh3_128_digest(copy.to_bytes(8, "little") + block)
