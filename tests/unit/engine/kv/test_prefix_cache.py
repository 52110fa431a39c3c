import pytest

from engine.kv.allocator import BlockAllocator
from engine.kv.prefix_cache import PrefixCache

A, B, C, D = b"a", b"b", b"c", b"d"


def cached(allocator: BlockAllocator, hashes: list[bytes]) -> list[int]:
    """Blocks that were computed under these hashes and released."""
    blocks = allocator.allocate(len(hashes))
    for block_id, block_hash in zip(blocks, hashes, strict=True):
        allocator.insert(block_id, block_hash)
    allocator.release(blocks)
    return blocks


def test_match_stops_at_the_first_unknown_hash() -> None:
    allocator = BlockAllocator(4)
    blocks = cached(allocator, [A, B, C])
    assert allocator.match([A, B, C, D]) == blocks
    assert allocator.match([A, D, C]) == blocks[:1]
    assert allocator.match([D, A]) == []


def test_match_mutates_nothing() -> None:
    allocator = BlockAllocator(3)
    cached(allocator, [A])
    cached(allocator, [B])
    allocator.match([A])
    allocator.allocate(2)
    assert allocator.match([A]) == [], "a match made the oldest block look recently used"
    assert allocator.match([B]) != []


def test_eviction_takes_leaves_before_their_ancestors() -> None:
    allocator = BlockAllocator(3)
    blocks = cached(allocator, [A, B, C])
    allocator.allocate(1)
    assert allocator.match([A, B, C]) == blocks[:2]
    allocator.allocate(1)
    assert allocator.match([A, B, C]) == blocks[:1]


def test_eviction_takes_the_least_recently_used_prefix() -> None:
    allocator = BlockAllocator(4)
    first = cached(allocator, [A, B])
    cached(allocator, [C, D])
    allocator.hold(first)
    allocator.release(first)
    allocator.allocate(2)
    assert allocator.match([A, B]) == first
    assert allocator.match([C, D]) == []


def test_free_blocks_are_used_before_cached_ones() -> None:
    allocator = BlockAllocator(4)
    blocks = cached(allocator, [A, B])
    allocator.allocate(2)
    assert allocator.match([A, B]) == blocks


def test_duplicate_hash_keeps_the_first_block_and_frees_the_other() -> None:
    allocator = BlockAllocator(2)
    first, second = allocator.allocate(2)
    assert allocator.insert(first, A)
    assert not allocator.insert(second, A)
    allocator.release([second])
    assert (allocator.num_free, allocator.num_cached, allocator.num_held) == (1, 0, 1)
    assert allocator.match([A]) == [first]
    allocator.check_integrity()


def test_orphan_of_an_evicted_duplicate_chain_is_still_evictable() -> None:
    allocator = BlockAllocator(3)
    original, duplicate = allocator.allocate(2)
    allocator.insert(original, A)
    assert not allocator.insert(duplicate, A)
    (child,) = allocator.allocate(1)
    allocator.insert(child, B)
    allocator.release([original])
    assert allocator.num_available == 1
    allocator.allocate(1)  # evicts the parent while a sequence holds the child
    assert allocator.match([A, B]) == []
    allocator.release([duplicate, child])
    assert allocator.can_allocate(2)
    allocator.allocate(2)
    allocator.check_integrity()


def test_changes_are_net_and_drained_once() -> None:
    allocator = BlockAllocator(2)
    cached(allocator, [A, B])
    change = allocator.drain_changes()
    assert (set(change.stored), set(change.removed)) == ({A, B}, set())
    assert allocator.drain_changes().stored == ()
    cached(allocator, [C])  # evicts B
    allocator.flush()  # and with it C, which nobody was told of, and A
    change = allocator.drain_changes()
    assert (set(change.stored), set(change.removed)) == (set(), {A, B})


def test_hash_lost_and_stored_again_between_two_drains_is_no_change() -> None:
    allocator = BlockAllocator(2)
    cached(allocator, [A])
    allocator.drain_changes()
    allocator.flush()
    cached(allocator, [A])
    change = allocator.drain_changes()
    assert (change.stored, change.removed) == ((), ())


def test_flush_spares_held_blocks_and_keeps_them_matchable() -> None:
    allocator = BlockAllocator(4)
    blocks = cached(allocator, [A, B])
    allocator.hold(blocks[:1])
    assert allocator.flush() == 1
    assert allocator.hashes() == [A]
    assert (allocator.num_free, allocator.num_cached, allocator.num_held) == (3, 0, 1)
    allocator.check_integrity()


def test_eviction_order_can_be_replaced() -> None:
    class NewestFirst(dict[int, None]):
        def add(self, block_id: int) -> None:
            self[block_id] = None

        def remove(self, block_id: int) -> None:
            del self[block_id]

        def pop(self) -> int:  # type: ignore[override]
            return self.popitem()[0]

    allocator = BlockAllocator(2, order=NewestFirst())
    cached(allocator, [A])
    cached(allocator, [B])
    allocator.allocate(1)
    assert allocator.match([A]) != []
    assert allocator.match([B]) == []


def test_registering_a_block_twice_is_a_bug_that_is_noticed() -> None:
    cache = PrefixCache(1)
    cache.insert(0, A)
    with pytest.raises(AssertionError, match="twice"):
        cache.insert(0, B)
