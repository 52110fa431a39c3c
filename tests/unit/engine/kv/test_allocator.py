import pytest

from engine.kv.allocator import BlockAllocator


def test_every_block_is_handed_out_once() -> None:
    allocator = BlockAllocator(5)
    assert sorted(allocator.allocate(5)) == [0, 1, 2, 3, 4]
    assert not allocator.can_allocate(1)
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 left"):
        allocator.allocate(1)


def test_block_is_free_only_after_its_last_reference() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    allocator.hold(blocks)
    allocator.release(blocks)
    assert allocator.num_held == 2
    allocator.release(blocks)
    assert (allocator.num_free, allocator.num_held) == (2, 0)


def test_release_more_often_than_held_is_noticed() -> None:
    allocator = BlockAllocator(1)
    blocks = allocator.allocate(1)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        allocator.release(blocks)


def test_can_allocate_and_count_idle_mutate_nothing() -> None:
    allocator = BlockAllocator(3)
    (held, cached) = allocator.allocate(2)
    allocator.insert(cached, b"h")
    allocator.release([cached])
    for _ in range(2):
        assert allocator.can_allocate(2)
        assert not allocator.can_allocate(3)
        assert allocator.count_idle([held, cached]) == 1
    assert allocator.match([b"h"]) == [cached]


def test_matched_block_is_safe_while_held() -> None:
    allocator = BlockAllocator(2)
    (block_id,) = allocator.allocate(1)
    allocator.insert(block_id, b"h")
    allocator.release([block_id])
    allocator.hold(allocator.match([b"h"]))
    allocator.allocate(1)
    assert not allocator.can_allocate(1)
    assert allocator.references(block_id) == 1


def test_integrity_check_notices_a_leak() -> None:
    allocator = BlockAllocator(2)
    (block_id,) = allocator.allocate(1)
    allocator.check_integrity()
    allocator._refs[block_id] = 0
    with pytest.raises(AssertionError, match="in 0 states"):
        allocator.check_integrity()


def test_hundred_thousand_blocks_cost_microseconds_each() -> None:
    """O(1) per block: a quadratic step anywhere would take minutes here."""
    count = 100_000
    allocator = BlockAllocator(count)
    hashes = [index.to_bytes(16, "little") for index in range(count)]
    for _ in range(2):
        blocks = allocator.allocate(count)
        for block_id, block_hash in zip(blocks, hashes, strict=True):
            allocator.insert(block_id, block_hash)
        allocator.release(blocks)
        assert len(allocator.match(hashes)) == count
    assert allocator.num_cached == count
