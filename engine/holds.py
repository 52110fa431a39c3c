"""Blocks held from outside: by a lease, which outlives the request that computed them.

Owned by `Engine`. What a holder may rely on:
- What num_computed tokens fill of a sequence's blocks never changes while held.
- An ended sequence keeps its blocks until `Engine.reap`, which the next `step` calls first. So
  whoever wants to hold them has from the return of one `step` to the next.
- A block that a step in flight writes is free for others only when the step is over.
- A preempted sequence loses its block table and is computed again. Blocks that were reported and
  held before stay right; the table may name other blocks of equal content for the same tokens.

Invariant: every `release` undoes one `hold`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from engine.kv.allocator import BlockAllocator


class Holds:
    """References to blocks that no sequence has."""

    def __init__(self, blocks: BlockAllocator) -> None:
        self._blocks = blocks
        self._holds: Counter[int] = Counter()

    def __iter__(self) -> Iterator[int]:
        """Blocks held, one for each reference."""
        return self._holds.elements()

    def hold(self, block_ids: Sequence[int]) -> None:
        """Add a reference to each; somebody has one already."""
        assert all(map(self._blocks.references, block_ids)), "not held by anyone"
        self._blocks.hold(block_ids)
        self._holds.update(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """Undo one `hold`, of the same blocks in table order."""
        assert all(self._holds[block_id] for block_id in block_ids), "released without a hold"
        self._holds.subtract(block_ids)
        for block_id in block_ids:
            if not self._holds[block_id]:
                del self._holds[block_id]
        self._blocks.release(block_ids)
