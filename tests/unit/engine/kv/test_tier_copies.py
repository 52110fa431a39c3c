import pytest

from engine.kv.allocator import BlockAllocator
from engine.kv.tier_copies import MAX_WAIT_S, TierCopies, build_tiers
from engine.rates import StepRates
from tests.support.engine import FakeClock
from tests.support.fake_executor import FakePool
from tests.support.host_memory import FakeHostMemory

HASHES = [bytes([i]) for i in range(6)]
BLOCK_SIZE = 4


class World:
    """A pool of a few blocks with numbers in them, and host memory below it."""

    def __init__(self, num_blocks: int, num_host: int = 12) -> None:
        self.pool = FakePool(num_blocks, BLOCK_SIZE)
        self.memory = FakeHostMemory(self.pool.blocks, num_host)
        self.clock = FakeClock()
        self.rates = StepRates()
        self.blocks: BlockAllocator
        self.blocks, copies = build_tiers(
            self.memory,
            num_blocks,
            block_size=BLOCK_SIZE,
            step_tokens=64,
            rates=self.rates,
            clock=self.clock,
        )
        assert isinstance(copies, TierCopies)
        self.copies = copies

    def compute(self, *indices: int) -> None:
        """Blocks of a prompt that are written and released."""
        blocks = self.blocks.allocate(len(indices))
        for index, block_id in zip(indices, blocks, strict=True):
            self.pool.blocks[block_id][:] = [index] * BLOCK_SIZE
            self.blocks.insert(block_id, HASHES[index])
        self.blocks.release(blocks)
        for _ in range(4):
            self.copies.tend()

    def fetch(self, name: str = "r", *, busy: bool = False) -> bool:
        return self.copies.fetch(name, HASHES, self.blocks.match(HASHES), busy=busy)

    def contents(self) -> list[int]:
        return [self.pool.blocks[block_id][0] for block_id in self.blocks.match(HASHES)]

    def check(self) -> None:
        self.blocks.check_integrity()
        assert self.blocks.num_held == len(set(self.copies.held_blocks()))


def evicted(*indices: int) -> World:
    """A free pool of four blocks; these were there, and are in host memory now."""
    world = World(4)
    filler = world.blocks.allocate(3)
    for index in indices:
        world.compute(index)
    world.blocks.release(filler)
    world.blocks.release(world.blocks.allocate(4))
    assert world.blocks.num_free == 4
    assert sorted(world.blocks.host_hashes()) == [HASHES[index] for index in indices]
    return world


def test_what_was_evicted_comes_back_in_order_and_leaves_host_memory() -> None:
    world = evicted(0, 1, 2)
    world.memory.delay = 2
    assert world.fetch()
    assert world.contents() == [], "nothing can be matched before it is there"
    assert world.blocks.num_held == 3
    assert [world.copies.tend() for _ in range(3)] == [False, False, True]
    assert world.contents() == [0, 1, 2]
    assert not world.fetch(), "what is here need not be fetched"
    assert world.blocks.host_hashes() == []
    stats = world.copies.stats()
    assert stats.hit_tokens == 3 * BLOCK_SIZE
    assert stats.loaded_bytes == 3 * world.memory.block_bytes
    world.check()


def test_whoever_wants_the_same_blocks_waits_for_the_same_load() -> None:
    world = evicted(0, 1, 2)
    world.memory.delay = 1
    assert world.fetch("a") and world.fetch("b")
    assert world.copies.num_loads == 1


def test_a_load_keeps_what_precedes_it() -> None:
    """Else it would take the very blocks without which what it brings can't be matched."""
    world = evicted(1, 2)
    world.compute(0)
    world.blocks.allocate(1)
    assert world.blocks.num_free == 2
    world.compute(4, 5)
    assert world.fetch()
    world.copies.tend()
    assert world.contents() == [0, 1, 2]


def test_a_request_gets_one_load_until_it_lost_its_blocks() -> None:
    world = evicted(0)
    assert world.fetch()
    world.copies.tend()
    filler = world.blocks.allocate(3)
    world.copies.tend()
    world.copies.tend()
    world.blocks.release([*filler, *world.blocks.allocate(1)])  # before the request was admitted
    assert HASHES[0] in world.blocks.host_hashes()
    assert not world.fetch(), "it computes what is missing"
    world.copies.forget("r")
    assert world.fetch()


def test_nobody_waits_for_a_load_that_does_not_end() -> None:
    world = evicted(0, 1, 2)
    world.memory.delay = 1_000_000
    assert world.fetch()
    world.clock.now += MAX_WAIT_S
    assert not world.fetch()
    assert world.copies.num_loads == 0
    world.check()


@pytest.mark.parametrize(
    ("prefill_s", "step_s", "busy", "fetches"),
    [(1e-6, 0.0, False, False), (1.0, 0.0, False, True), (1.0, 9.0, True, False)],
    ids=["computing is faster", "copying is faster", "a step takes longer than both"],
)
def test_a_load_is_made_only_if_it_pays(
    prefill_s: float, step_s: float, busy: bool, fetches: bool
) -> None:
    world = evicted(0, 1, 2)
    world.rates.observe(16, 0, prefill_s)
    if step_s:
        world.rates.observe(0, 1, step_s)
    assert world.fetch(busy=busy) is fetches


def test_what_was_flushed_on_its_way_is_not_found_when_it_arrives() -> None:
    world = evicted(0, 1, 2)
    world.memory.delay = 1
    assert world.fetch()
    world.copies.flush()
    world.blocks.flush()
    assert not world.fetch("other")
    world.copies.tend()
    world.copies.tend()
    assert (world.contents(), world.blocks.host_hashes()) == ([], [])
    assert world.blocks.num_free == 4
    world.check()


def test_after_a_failed_copy_the_tier_is_left_alone() -> None:
    world = evicted(0, 1, 2)
    world.memory.fails = True
    assert world.fetch()
    world.copies.tend()
    assert (world.contents(), world.blocks.host_hashes()) == ([], [])
    world.memory.fails = False
    world.compute(0, 1, 2)
    world.compute(3, 4)
    assert not world.fetch()
    assert world.copies.stats().cached_blocks == 0
    world.check()
