"""Requests of the placement simulator, read from a public trace, and the most any cache could hit.

A trace is a file of JSON lines as published with Mooncake (kvcache-ai/Mooncake, FAST25-release):
`timestamp` in ms, `input_length` and `output_length` in tokens, `hash_ids` with one id for each
block of 512 prompt tokens, equal ids for equal prefixes.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_SIZE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """One request; times in seconds from the start."""

    arrives_at: float
    prompt_tokens: int
    output_tokens: int
    hashes: Sequence[bytes]
    """Of the prompt's full blocks."""


def read_trace(path: Path) -> list[TracedRequest]:
    """All requests of a file, in the order of their arrival."""
    requests = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        full = row["input_length"] // BLOCK_SIZE
        requests.append(
            TracedRequest(
                arrives_at=row["timestamp"] / 1e3,
                prompt_tokens=max(1, row["input_length"]),
                output_tokens=max(1, row["output_length"]),
                hashes=[_hash(0, block) for block in row["hash_ids"][:full]],
            )
        )
    return sorted(requests, key=lambda request: request.arrives_at)


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


class BlockCache:
    """Least recently used blocks go first; of one prompt, its end before its beginning."""

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that are there."""
        for count, block in enumerate(hashes):
            if block not in self._blocks:
                return count
        return len(hashes)

    def store(self, hashes: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Put in a prompt's blocks; returns those that are new and those that had to go."""
        stored = [block for block in hashes if block not in self._blocks]
        for block in reversed(hashes):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        removed = []
        while self._capacity is not None and len(self._blocks) > self._capacity:
            removed.append(self._blocks.popitem(last=False)[0])
        return stored, removed


def hit_rate_of_one_cache(requests: Sequence[TracedRequest], capacity: int | None) -> float:
    """Prompt tokens that one cache of the whole fleet would spare, as a part of all.

    Each prompt is in the cache when the next arrives, so no fleet can do better with an infinite
    one (`capacity` None).
    """
    cache, hit, total = BlockCache(capacity), 0, 0
    for request in requests:
        matched = cache.match(request.hashes)
        cache.store(request.hashes)
        hit += min(matched * BLOCK_SIZE, request.prompt_tokens - 1)
        total += request.prompt_tokens
    return hit / total


def _hash(copy: int, block: int) -> bytes:
    return xxhash.xxh3_128_digest(copy.to_bytes(8, "little") + block.to_bytes(8, "little"))


def _salted(copy: int, block: bytes) -> bytes:
    return xxhash.xxh3_128_digest(copy.to_bytes(8, "little") + block)
