"""A large index, while its table grows, against sets of hashes per worker."""

import random

import pytest

from router.fleet.worker import CacheChange
from router.placement.block_table import FIRST_CAPACITY
from router.placement.prefix_index import NEAR_BLOCKS, STRIDE, PrefixIndex
from router.placement.prefix_walk import Held

WORKERS = [f"w{i}" for i in range(12)]


def hashes_of(rng: random.Random, count: int) -> list[bytes]:
    return [rng.randbytes(16) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_large_index_holds_what_its_workers_said(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex(prediction_ttl_s=10.0)
    held: dict[str, set[bytes]] = {worker: set() for worker in WORKERS}
    seqs = dict.fromkeys(WORKERS, 0)

    def tell(worker: str, stored: list[bytes], removed: list[bytes], *, reset: bool) -> None:
        seqs[worker] += 1
        change = CacheChange(epoch=1, seq=seqs[worker], reset=reset, stored=stored, removed=removed)
        index.apply(worker, change)

    for worker in WORKERS:
        index.add(worker, 1)
        tell(worker, [], [], reset=True)
    chains = [hashes_of(rng, rng.choice([3, 40, 700])) for _ in range(120)]
    for turn in range(400):
        worker, chain = rng.choice(WORKERS), rng.choice(chains)
        match rng.randrange(12):
            case 0:
                index.drop(worker)
                index.add(worker, 1)
                held[worker] = set(chain)
                tell(worker, chain, [], reset=True)
            case 1 | 2 | 3:
                # From anywhere in a prompt, as a worker with other ideas of eviction would.
                removed = rng.sample(chain, rng.randrange(1, len(chain)))
                held[worker] -= set(removed)
                tell(worker, [], removed, reset=False)
            case _:
                held[worker] |= set(chain)
                tell(worker, chain, [], reset=False)
        if turn % 20 == 0:
            for chain in chains:
                assert index.match(chain) == {
                    worker: Held(length)
                    for worker in WORKERS
                    if (length := leading(chain, held[worker]))
                }
            assert len(index) == len(set().union(*held.values()))
    assert index.num_bytes > 2 * 12 * FIRST_CAPACITY, "the table has grown"


def leading(chain: list[bytes], held: set[bytes]) -> int:
    for count, block in enumerate(chain):
        if block not in held:
            return count
    return len(chain)


def test_growing_loses_nothing_and_leaves_behind_what_nobody_has() -> None:
    rng = random.Random(7)
    index = PrefixIndex(prediction_ttl_s=10.0)
    index.add("w", 1)
    kept = hashes_of(rng, 1000)
    index.apply("w", CacheChange(epoch=1, seq=0, reset=True, stored=kept, removed=[]))
    before: list[bytes] = []
    for seq in range(1, 300):
        stored = hashes_of(rng, 500)
        index.apply("w", CacheChange(epoch=1, seq=seq, reset=False, stored=stored, removed=before))
        before = stored
        assert len(index) == 1500
    assert index.match(kept) == {"w": Held(1000)}
    assert index.num_bytes <= 8 * 12 * FIRST_CAPACITY, "150,000 blocks came and went"


def test_large_snapshot_fits_at_once() -> None:
    rng = random.Random(3)
    index = PrefixIndex(prediction_ttl_s=10.0)
    index.add("w", 1)
    stored = hashes_of(rng, 20 * FIRST_CAPACITY)
    index.apply("w", CacheChange(epoch=1, seq=0, reset=True, stored=stored, removed=[]))
    assert index.match(stored) == {"w": Held(len(stored))}
    assert len(index) == len(stored)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_long_prompt_each_worker_has_what_it_has_to_the_block(seed: int) -> None:
    """Beyond its landmarks too, and after predictions; in which tier, to the landmark."""
    rng = random.Random(seed)
    prompt = hashes_of(rng, NEAR_BLOCKS + 40 * STRIDE + rng.randrange(STRIDE))
    index = PrefixIndex(prediction_ttl_s=10.0)
    wanted = {}
    for worker in WORKERS:
        length = rng.choice([rng.randrange(1, len(prompt)), NEAR_BLOCKS + rng.randrange(30)])
        device = rng.choice([length, rng.randrange(length)])
        index.add(worker, 1)
        known = CacheChange(
            epoch=1,
            seq=0,
            reset=True,
            stored=prompt[:device],
            removed=[],
            host_stored=prompt[device - device // 3 : length],
        )
        index.apply(worker, known)
        wanted[worker] = Held(length, length - device)
    got = index.match(prompt)
    assert {worker: held.blocks for worker, held in got.items()} == {
        worker: held.blocks for worker, held in wanted.items()
    }
    assert all(abs(got[worker].lower - wanted[worker].lower) < STRIDE for worker in WORKERS)
    sent, longer = prompt[: len(prompt) - 3], [*prompt, *hashes_of(rng, 100)]
    index.add("new", 1)
    index.predict(["new", WORKERS[0]], sent, 1.0)
    after = index.match(longer)
    assert after["new"] == Held(len(sent)), "the end of what it was sent is no landmark"
    assert after[WORKERS[0]].blocks == max(len(sent), wanted[WORKERS[0]].blocks)
    assert all(after[worker] == got[worker] for worker in WORKERS[1:])
