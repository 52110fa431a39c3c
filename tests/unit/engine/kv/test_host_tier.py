from engine.kv.allocator import BlockAllocator
from engine.kv.host_tier import HostTier

A, B, C, D = b"a", b"b", b"c", b"d"


def tiers(num_blocks: int, num_host: int, window: int = 4) -> tuple[BlockAllocator, HostTier]:
    tier = HostTier(num_host, window=window)
    return BlockAllocator(num_blocks, tier=tier), tier


def computed(allocator: BlockAllocator, *hashes: bytes) -> list[int]:
    """Blocks that hold these hashes and that nobody holds any more."""
    blocks = allocator.allocate(len(hashes))
    for block_id, block_hash in zip(blocks, hashes, strict=True):
        allocator.insert(block_id, block_hash)
    allocator.release(blocks)
    return blocks


def save(allocator: BlockAllocator, tier: HostTier, most: int = 9) -> list[bytes]:
    """Save what is due; returns it."""
    savings = tier.begin_savings(allocator.num_free, most)
    for saving in savings:
        tier.end_saving(saving, copied=True)
    allocator.check_integrity()
    return [saving.block_hash for saving in savings]


def test_nothing_is_saved_while_enough_blocks_are_free() -> None:
    allocator, tier = tiers(8, 8, window=3)
    computed(allocator, A, B)
    assert save(allocator, tier) == []


def test_blocks_next_to_be_evicted_are_saved_first_and_survive_that() -> None:
    allocator, tier = tiers(3, 8, window=2)
    computed(allocator, A, B, C)
    assert save(allocator, tier) == [C, B]  # leaves first
    assert save(allocator, tier) == []
    allocator.allocate(2)
    assert tier.has(B) and tier.has(C) and not tier.has(A)
    assert allocator.match([A, B]) != [] and tier.num_lost == 0


def test_a_block_that_is_evicted_before_it_is_saved_is_lost() -> None:
    allocator, tier = tiers(1, 8)
    computed(allocator, A)
    allocator.allocate(1)
    assert not tier.has(A) and tier.num_lost == 1


def test_a_copy_does_not_count_if_its_block_was_reused_meanwhile() -> None:
    allocator, tier = tiers(1, 8)
    (block_id,) = computed(allocator, A)
    (saving,) = tier.begin_savings(0, 1)
    assert allocator.allocate(1) == [block_id]
    # The same hash on the same block again, while the copy may have read what was in between.
    allocator.insert(block_id, A)
    allocator.release([block_id])
    tier.end_saving(saving, copied=True)
    assert not tier.has(A) and tier.num_free == 8
    allocator.check_integrity()


def test_a_saved_block_that_is_used_again_leaves_the_tier() -> None:
    allocator, tier = tiers(2, 4)
    computed(allocator, A, B)
    save(allocator, tier)
    allocator.drain_changes()
    held = allocator.match([A])
    allocator.hold(held)
    assert tier.has(B) and not tier.has(A)
    assert list(allocator.drain_changes().host_removed) == [A]
    allocator.release(held)
    assert save(allocator, tier) == [A]


def test_a_hash_that_is_computed_again_leaves_the_tier() -> None:
    allocator, tier = tiers(1, 4)
    computed(allocator, A)
    save(allocator, tier)
    computed(allocator, B)
    assert tier.has(A)
    computed(allocator, A)
    assert not tier.has(A)


def test_a_full_tier_gives_up_what_came_first() -> None:
    allocator, tier = tiers(1, 2)
    for block_hash in (A, B, C):
        computed(allocator, block_hash)
        assert save(allocator, tier) == [block_hash]
    assert not tier.has(A) and tier.has(B) and tier.has(C)
    change = allocator.drain_changes()
    assert (set(change.host_stored), set(change.host_removed)) == ({B, C}, set())


def test_copies_under_way_hold_host_blocks() -> None:
    allocator, tier = tiers(1, 2)
    computed(allocator, A)
    save(allocator, tier)
    computed(allocator, B)
    assert tier.begin_loading([A]) == [0]
    (saving,) = tier.begin_savings(0, 9)
    computed(allocator, C)
    assert tier.begin_savings(0, 9) == []
    assert (tier.num_free, tier.num_cached, tier.num_held) == (0, 0, 2)
    tier.end_loading([A])
    tier.end_saving(saving, copied=True)
    assert (tier.num_free, tier.num_cached, tier.num_held) == (2, 0, 0)
    allocator.check_integrity()


def test_a_hash_is_not_saved_while_it_is_loaded() -> None:
    allocator, tier = tiers(1, 4)
    computed(allocator, A)
    save(allocator, tier)
    computed(allocator, B)
    tier.begin_loading([A])
    computed(allocator, A)  # by another sequence
    assert save(allocator, tier) == [A] and not tier.has(A)
    tier.end_loading([A])
    assert save(allocator, tier) == [A] and tier.has(A)
    allocator.check_integrity()


def test_flush_empties_both_tiers_and_voids_what_is_being_saved() -> None:
    allocator, tier = tiers(3, 8)
    computed(allocator, A, B, C)
    save(allocator, tier, most=1)
    (saving, *_) = tier.begin_savings(0, 1)
    assert allocator.flush() == 3 + 1
    tier.end_saving(saving, copied=True)
    assert (tier.num_free, tier.num_lost) == (8, 0)
    assert allocator.host_hashes() == []
    allocator.check_integrity()


def test_changes_name_each_tier() -> None:
    allocator, tier = tiers(1, 4)
    computed(allocator, A)
    save(allocator, tier)
    change = allocator.drain_changes()
    assert (change.stored, change.host_stored) == ((A,), (A,))
    computed(allocator, B)
    change = allocator.drain_changes()
    assert (change.stored, change.removed, change.host_removed) == ((B,), (A,), ())
    assert allocator.host_hashes() == [A]
