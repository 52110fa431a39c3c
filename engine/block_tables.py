"""Blocks of sequences: matched in the prefix cache, grown, registered when complete, given back.

Between the scheduler, which decides who gets blocks, and the allocator, which only counts. Owns
block_table, num_registered and the prefix accounting of every sequence. Invariant: a block table
covers num_computed tokens, and what a step computes, with no block to spare.
"""

from collections.abc import Iterable, Sequence

from engine.kv.allocator import BlockAllocator
from engine.sequence import SequenceState


class BlockTables:
    """The block side of sequences."""

    def __init__(self, blocks: BlockAllocator, *, block_size: int, caching: bool) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._caching = caching
        self.cached_tokens = 0
        self.lookup_tokens = 0

    def match(self, sequence: SequenceState, *, whole: bool = False) -> list[int]:
        """Cached blocks of a sequence's prefix. Mutates nothing.

        Unless the `whole` may be matched, because no token has to be computed here, at least one
        token is left to compute.
        """
        if not self._caching:
            return []
        most = (len(sequence.token_ids) - (not whole)) // self._block_size
        return self._blocks.match(sequence.block_hashes[:most])

    def cached_prefix(self, sequence: SequenceState) -> int:
        """Tokens that `match` finds now."""
        return len(self.match(sequence)) * self._block_size

    def spare_after(
        self, sequence: SequenceState, matched: Sequence[int], others: Iterable[SequenceState]
    ) -> int:
        """Blocks left over after giving a sequence all it needs, and `others` what they lack.

        Negative if there are not enough. Only tokens that exist already are counted.
        """
        spare = self._blocks.num_available - self._blocks.count_idle(matched)
        spare -= self._count(len(sequence.token_ids)) - len(matched)
        for other in others:
            spare -= max(0, self._count(len(other.token_ids)) - len(other.block_table))
        return spare

    def take(self, sequence: SequenceState, matched: list[int]) -> None:
        """Give a sequence without blocks what `match` found."""
        self._blocks.hold(matched)
        sequence.block_table = matched
        sequence.num_registered = len(matched)
        sequence.num_computed = len(matched) * self._block_size
        if sequence.age < 0:
            sequence.num_cached_tokens = sequence.num_computed
            self.lookup_tokens += len(sequence.token_ids)
            self.cached_tokens += sequence.num_computed

    def lacks(self, sequence: SequenceState, num_tokens: int) -> int:
        """Blocks that are missing, and can't be had, for `num_tokens` more tokens."""
        missing = self._count(sequence.num_computed + num_tokens) - len(sequence.block_table)
        return max(0, missing - self._blocks.num_available) if missing > 0 else 0

    def grow(self, sequence: SequenceState, num_tokens: int) -> int:
        """Allocate for up to `num_tokens` more tokens. Returns how many have room."""
        table = sequence.block_table
        missing = self._count(sequence.num_computed + num_tokens) - len(table)
        if missing <= 0:
            return num_tokens
        table += self._blocks.allocate(min(missing, self._blocks.num_available))
        return min(num_tokens, len(table) * self._block_size - sequence.num_computed)

    def register(self, sequence: SequenceState) -> None:
        """Tell the prefix cache of the blocks that are complete now."""
        full = sequence.num_computed // self._block_size
        if full <= sequence.num_registered or not self._caching:
            return
        sequence.extend_hashes(full, self._block_size)
        known = min(full, len(sequence.block_hashes))
        for index in range(sequence.num_registered, known):
            self._blocks.insert(sequence.block_table[index], sequence.block_hashes[index])
        sequence.num_registered = max(known, sequence.num_registered)

    def release(self, sequence: SequenceState) -> None:
        """Take a sequence's blocks away. Those registered stay cached until they are evicted."""
        self._blocks.release(sequence.block_table)
        sequence.block_table = []  # a plan may still show the old list
        sequence.num_registered = 0
        sequence.num_computed = 0

    def will_compute(
        self, others: Iterable[SequenceState], sequence: SequenceState, index: int
    ) -> bool:
        """True if one of `others` will soon put block `index` of this sequence into the cache."""
        end = (index + 1) * self._block_size
        hashes = sequence.block_hashes
        if not self._caching or index >= len(hashes) or end >= len(sequence.token_ids):
            return False
        return any(
            other.num_computed < end <= len(other.token_ids)
            and index < len(other.block_hashes)
            and other.block_hashes[index] == hashes[index]
            for other in others
        )

    def _count(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
