"""A prefix cache of whole blocks in virtual time, and the most that any cache could hit."""

from collections import OrderedDict
from collections.abc import Sequence

from diptych.planning.trace import BLOCK_SIZE, TracedRequest


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


def hits_of_one_cache(requests: Sequence[TracedRequest], capacity: int | None) -> list[int]:
    """Prompt tokens of each request that one cache of the whole fleet would spare.

    Each prompt is in the cache when the next arrives, so no fleet can do better with an infinite
    one (`capacity` None).
    """
    cache, hits = BlockCache(capacity), []
    for request in requests:
        matched = cache.match(request.hashes)
        cache.store(request.hashes)
        hits.append(min(matched * BLOCK_SIZE, request.prompt_tokens - 1))
    return hits


def hit_rate_of_one_cache(requests: Sequence[TracedRequest], capacity: int | None) -> float:
    """What `hits_of_one_cache` spares, as a part of all prompt tokens."""
    hits = sum(hits_of_one_cache(requests, capacity))
    return hits / sum(request.prompt_tokens for request in requests)
