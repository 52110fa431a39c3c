"""Asserts what an engine promises at rest: references of blocks and steps all have owners."""

from collections import Counter
from collections.abc import Iterable

from engine.draft import ScheduledStep
from engine.kv.allocator import BlockAllocator
from engine.sequence import SequenceState


def check_ownership(
    blocks: BlockAllocator,
    sequences: Iterable[SequenceState],
    others: Iterable[int],
    in_flight: Iterable[ScheduledStep],
) -> None:
    """Assert that every block is in one state and every reference has its owner.

    Args:
        blocks: of the pool.
        sequences: all that own blocks, each once.
        others: blocks held by anything else, one for each reference.
        in_flight: steps under way.
    """
    blocks.check_integrity()
    owners = Counter(others)
    steps = Counter(sequence for step in in_flight for sequence in step.sequences)
    for sequence in sequences:
        owners.update(sequence.block_table)
        counted, expected = sequence.steps_in_flight, steps.pop(sequence, 0)
        assert counted == expected, f"{sequence.request_id}: {expected} steps in flight"
    assert not steps, "a step in flight computes a sequence that nobody owns"
    for block_id in range(blocks.num_blocks):
        counted, owned = blocks.references(block_id), owners[block_id]
        assert counted == owned, f"block {block_id}: {counted} references, {owned} owners"
