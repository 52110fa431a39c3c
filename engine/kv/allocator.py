"""Who holds which KV block: reference counts, the free list and the prefix cache over them.

Called by the scheduler and the engine, in the engine loop's thread. Every block is in exactly one
state: free (no content worth keeping), cached (nobody holds it, its hash can be matched, it may be
evicted) or held (at least one reference). Invariant: free + cached + held == total.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from engine.kv.host_tier import HostTier
from engine.kv.prefix_cache import EvictionOrder, PrefixCache
from engine.request import CacheChange


class BlockAllocator:
    """Hands out the blocks of one pool, by id in [0, num_blocks)."""

    def __init__(
        self,
        num_blocks: int,
        *,
        order: EvictionOrder | None = None,
        tier: HostTier | None = None,
    ) -> None:
        """Args: tier gets what is evicted here, if there is one."""
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cache = PrefixCache(num_blocks, order, tier)
        self._tier = tier
        self.num_releases = 0
        """Calls of `release`: until there is another one, no more blocks become available."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._refs)

    @property
    def num_free(self) -> int:
        """Blocks without content worth keeping."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but a match can find."""
        return self._cache.num_idle

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return len(self._refs) - self.num_available

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now: free and cached ones."""
        return len(self._free) + self._cache.num_idle

    def can_allocate(self, num_blocks: int) -> bool:
        """True if `allocate(num_blocks)` would succeed."""
        return num_blocks <= self.num_available

    def count_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks nobody holds: holding them costs that many available blocks."""
        refs = self._refs
        return sum(refs[block_id] == 0 for block_id in block_ids)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one reference, evicting cached ones when no free ones are left.

        The caller has asked `can_allocate`. Contents are whatever they were.
        """
        assert self.can_allocate(num_blocks), (
            f"{num_blocks} blocks wanted, {self.num_available} left"
        )
        blocks = []
        for _ in range(num_blocks):
            block_id = self._free.pop() if self._free else self._cache.evict()
            self._refs[block_id] = 1
            blocks.append(block_id)
        return blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `hashes`. Mutates nothing; `hold` what you use."""
        return self._cache.match(hashes)

    def find(self, block_hash: bytes) -> int | None:
        """The block that is registered under a hash. `hold` it before you use it."""
        return self._cache.find(block_hash)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block. Only for matched or held blocks, not for free ones."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                self._cache.make_held(block_id)
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference from each block of a table, given in table order.

        A block that loses its last reference is cached if it is registered, else free.
        """
        self.num_releases += 1
        for block_id in reversed(block_ids):  # descendants first: the eviction order relies on it
            count = self._refs[block_id] - 1
            assert count >= 0, f"block {block_id} was released more often than held"
            self._refs[block_id] = count
            if count == 0:
                if self._cache.holds(block_id):
                    self._cache.make_idle(block_id)
                else:
                    self._free.append(block_id)

    def insert(self, block_id: int, block_hash: bytes) -> bool:
        """Register a held block whose tokens are all computed; see `PrefixCache.insert`."""
        assert self._refs[block_id] > 0, f"block {block_id} was registered while nobody holds it"
        return self._cache.insert(block_id, block_hash)

    def flush(self) -> int:
        """Free every cached block, of the tier below as well. Returns how many."""
        below = 0 if self._tier is None else self._tier.flush()
        freed = self._cache.flush()
        self._free.extend(freed)
        return below + len(freed)

    def drain_changes(self) -> CacheChange:
        """Net change of the cached hashes since the last call, tier by tier."""
        change = self._cache.drain_changes()
        if self._tier is None:
            return change
        stored, removed = self._tier.drain_changes()
        return replace(change, host_stored=stored, host_removed=removed)

    def hashes(self) -> list[bytes]:
        """Every hash that a match can find now."""
        return self._cache.hashes()

    def host_hashes(self) -> list[bytes]:
        """Every hash that the tier below can give back."""
        return [] if self._tier is None else self._tier.hashes()

    def references(self, block_id: int) -> int:
        """How many holders a block has."""
        return self._refs[block_id]

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state. O(number of blocks)."""
        self._cache.check_integrity()
        if self._tier is not None:
            self._tier.check_integrity(self._cache.idle_blocks())
        free, cached = set(self._free), set(self._cache.idle_blocks())
        assert len(free) == len(self._free), "a block is free twice"
        for block_id, count in enumerate(self._refs):
            states = (block_id in free) + (block_id in cached) + (count > 0)
            assert states == 1, f"block {block_id} is in {states} states, {count} references"
            assert block_id not in free or not self._cache.holds(block_id), (
                "a free block has a hash"
            )
