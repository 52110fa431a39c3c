"""Blocks of sequences: matched in the prefix cache, grown, registered when complete, given back.

Between the scheduler, which decides who gets blocks, and the allocator, which only counts. Owns
block_table, num_slots, num_registered and the prefix accounting of every sequence. Invariant: a
block table covers num_scheduled tokens, with no block to spare.
"""

from collections.abc import Iterable, Sequence

from engine.kv.allocator import BlockAllocator
from engine.kv.tier_copies import TierCopies
from engine.sequence import SequenceState


class BlockTables:
    """The block side of sequences."""

    def __init__(
        self,
        blocks: BlockAllocator,
        *,
        block_size: int,
        caching: bool,
        copies: TierCopies | None = None,
    ) -> None:
        """Args: copies bring blocks back that the pool has evicted, if there is a tier below."""
        self._blocks = blocks
        self._copies = copies
        self._block_size = block_size
        self._caching = caching
        self.cached_tokens = 0
        self.lookup_tokens = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be had now."""
        return self._blocks.num_available

    @property
    def num_releases(self) -> int:
        """While this stands still, no more blocks become available."""
        return self._blocks.num_releases

    @property
    def awaits_load(self) -> bool:
        """True if blocks come back for somebody who has patience left, which wears on."""
        return self._copies is not None and self._copies.num_loads > 0

    def match(self, sequence: SequenceState, *, whole: bool = False) -> list[int]:
        """Cached blocks of a sequence's prefix. Mutates nothing.

        Unless the `whole` may be matched, because no token has to be computed here, at least one
        token is left to compute.
        """
        return self._blocks.match(self._wanted(sequence, whole=whole))

    def cached_prefix(self, sequence: SequenceState) -> int:
        """Tokens that `match` finds now, or will once `fetch` has brought them back."""
        count = len(self.match(sequence))
        if self._copies is not None:
            count += self._copies.reachable(self._wanted(sequence)[count:])
        return count * self._block_size

    def fetch(
        self, sequence: SequenceState, matched: Sequence[int], *, whole: bool = False, busy: bool
    ) -> bool:
        """Bring back what the tier below has of a prefix. True: on its way, so admit later.

        The sequence must fit: this takes blocks, of those that it needs.

        Args:
            sequence: without blocks.
            matched: from `match`.
            whole: as for `match`.
            busy: other sequences run.
        """
        if self._copies is None:
            return False
        wanted = self._wanted(sequence, whole=whole)
        return self._copies.fetch(sequence.request_id, wanted, matched, busy=busy)

    def spare_after(
        self, sequence: SequenceState, matched: Sequence[int], others: Iterable[SequenceState]
    ) -> int:
        """Blocks left over after giving a sequence all it needs, and `others` what they lack.

        Negative if there are not enough. Only tokens that exist already, or are pending, count.
        """
        spare = self._blocks.num_available - self._blocks.count_idle(matched)
        spare -= self._count(len(sequence.token_ids)) - len(matched)
        for other in others:
            length = len(other.token_ids) + other.num_pending
            if length > other.num_slots:
                spare -= self._count(length - other.num_slots)
        return spare

    def take(self, sequence: SequenceState, matched: list[int]) -> None:
        """Give a sequence without blocks what `match` found."""
        self._blocks.hold(matched)
        sequence.block_table = matched
        sequence.num_registered = len(matched)
        sequence.num_slots = len(matched) * self._block_size
        sequence.num_computed = sequence.num_scheduled = sequence.num_slots
        if sequence.age < 0:
            sequence.num_cached_tokens = sequence.num_computed
            self.lookup_tokens += len(sequence.token_ids)
            self.cached_tokens += sequence.num_computed

    def missing(self, sequence: SequenceState, num_tokens: int) -> int:
        """Blocks to allocate before `num_tokens` more tokens have room."""
        lacking = sequence.num_scheduled + num_tokens - sequence.num_slots
        return self._count(lacking) if lacking > 0 else 0

    def grow(self, sequence: SequenceState, num_tokens: int) -> None:
        """Allocate for `num_tokens` more tokens."""
        blocks = self._blocks.allocate(self.missing(sequence, num_tokens))
        sequence.block_table += blocks
        sequence.num_slots += len(blocks) * self._block_size

    def room(self, sequence: SequenceState, num_blocks: int) -> int:
        """How many more tokens it could have computed with so many more blocks."""
        return sequence.num_slots + num_blocks * self._block_size - sequence.num_scheduled

    def register(self, sequences: Iterable[SequenceState]) -> None:
        """Tell the prefix cache of the blocks that are complete now."""
        if not self._caching:
            return
        for sequence in sequences:
            full = sequence.num_computed // self._block_size
            if full > sequence.num_registered:
                self._register(sequence, full)

    def release(self, sequence: SequenceState) -> None:
        """Take a sequence's blocks away. Those registered stay cached until they are evicted."""
        assert not sequence.steps_in_flight, "a step in flight writes to these blocks"
        if self._copies is not None:
            self._copies.forget(sequence.request_id)
        self._blocks.release(sequence.block_table)
        sequence.block_table = []  # a plan may still show the old list
        sequence.num_registered = 0
        sequence.num_slots = sequence.num_computed = sequence.num_scheduled = 0

    def will_compute(
        self, others: Iterable[SequenceState], sequence: SequenceState, index: int
    ) -> bool:
        """True if one of `others` will soon put block `index` of this sequence into the cache."""
        end = (index + 1) * self._block_size
        hashes = sequence.block_hashes
        if not self._caching or index >= len(hashes) or end >= len(sequence.token_ids):
            return False
        if end > sequence.num_reusable:
            return False
        return any(
            other.num_computed < end <= len(other.token_ids)
            and index < len(other.block_hashes)
            and other.block_hashes[index] == hashes[index]
            for other in others
        )

    def _wanted(self, sequence: SequenceState, *, whole: bool = False) -> list[bytes]:
        if not self._caching:
            return []
        most = min(len(sequence.token_ids) - (not whole), sequence.num_reusable)
        return sequence.block_hashes[: most // self._block_size]

    def _register(self, sequence: SequenceState, full: int) -> None:
        sequence.extend_hashes(full, self._block_size)
        known = min(full, len(sequence.block_hashes))
        for index in range(sequence.num_registered, known):
            self._blocks.insert(sequence.block_table[index], sequence.block_hashes[index])
        sequence.num_registered = max(known, sequence.num_registered)

    def _count(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
