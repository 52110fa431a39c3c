"""What one choice of workers costs the router, at the size of a large fleet.

    python -m benchmarks.router_placement [--workers 256] [--blocks 10000000] [--save]

An index is filled by cache events of every worker; then prompts are placed whose beginning one
worker has, and the two that were chosen report the blocks that they got. A prompt costs two things:
its hashes, once however often it is placed, and the choice. Times are CPU seconds of the thread
that places, so that other work on the machine does not count. Beside them a peer that needs no
index: a Python dict from hash to the set of holders.
"""

import argparse
import gc
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.report import Report
from core.block_hash import hash_blocks, root_hash
from router.fleet.worker import CacheChange, KvLayout, Role, WorkerInfo, WorkerLoad
from router.placement.cost import CostSettings, Prompt
from router.placement.decision import Placement
from router.placement.placer import Placer

BLOCK_SIZE = 16
CHAIN = 512
"""Blocks that one event stores: a prompt of 8,192 tokens."""
EVENT_BLOCKS = 16


def info(index: int) -> WorkerInfo:
    """Every fourth worker is for decode."""
    role = Role.PREFILL if index % 4 else Role.DECODE
    return WorkerInfo(
        worker_id=f"w{index}",
        epoch=1,
        role=role,
        model="bench",
        model_digest=b"bench",
        layout=KvLayout(
            num_layers=32,
            num_kv_heads=8,
            head_dim=128,
            block_size=BLOCK_SIZE,
            dtype="bfloat16",
            block_bytes=2 << 20,
        ),
        num_blocks=50_000,
        max_model_len=1 << 20,
        max_num_seqs=256,
        vocab_size=128_256,
        eos_token_ids=(),
        kv_address="bench" if role is Role.PREFILL else "",
    )


def change(seq: int, stored: Sequence[bytes], removed: Sequence[bytes] = ()) -> CacheChange:
    """A cache event; the first of a worker is a snapshot."""
    return CacheChange(epoch=1, seq=seq, reset=seq == 0, stored=stored, removed=removed)


class Filled:
    """A placer whose index is full, and what it was filled with."""

    def __init__(self, workers: int, blocks: int, rng: random.Random) -> None:
        self.placer = Placer(
            CostSettings(prefill_tokens_per_s=20_000, decode_step_s=0.02, transfer_bytes_per_s=2e10)
        )
        self.workers = [f"w{index}" for index in range(workers)]
        self.seqs = dict.fromkeys(self.workers, 0)
        self.prompts: list[bytes] = []
        """Packed, or they were most of what a garbage collection visits."""
        self.slowest_s: list[float] = []
        self._rng = rng
        for index, worker in enumerate(self.workers):
            self.placer.add(worker, info(index))
            self.placer.apply(worker, change(0, ()))
        for index in range(blocks // CHAIN):
            hashes = self.fresh(CHAIN)
            if index % max(1, blocks // CHAIN // 1000) == 0:
                self.prompts.append(b"".join(hashes))
            self.slowest_s.append(self.tell(rng.choice(self.workers), hashes))

    def fresh(self, count: int) -> list[bytes]:
        """Hashes that nobody has."""
        return split(self._rng.randbytes(16 * count))

    def tell(self, worker: str, stored: Sequence[bytes], removed: Sequence[bytes] = ()) -> float:
        """Apply one event; returns the seconds it took."""
        self.seqs[worker] += 1
        event = change(self.seqs[worker], stored, removed)
        return timed(lambda: self.placer.apply(worker, event))

    def place(self, hashes: Sequence[bytes], now: float) -> tuple[float, Placement]:
        """Place one prompt; returns the seconds it took, and where it is."""
        prompt = Prompt(num_tokens=len(hashes) * BLOCK_SIZE + 5, max_new_tokens=256)
        placements: list[Placement] = []
        took = timed(lambda: placements.append(self.placer.place(prompt, lambda _: hashes, now)))
        return took, placements[0]


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def placements(filled: Filled, cached: int, total: int, count: int) -> list[float]:
    """Times to place prompts of some length whose first blocks are cached somewhere."""
    times = []
    for turn in range(count):
        known = split(filled.prompts[turn % len(filled.prompts)][: 16 * cached])
        hashes = [*known, *filled.fresh(total - len(known))]
        now = turn * 0.01
        took, placement = filled.place(hashes, now)
        times.append(took)
        worker = filled.workers[turn % len(filled.workers)]
        load = WorkerLoad(running=turn % 32, prefill_tokens_per_s=2e4, decode_step_s=0.02)
        filled.placer.report(worker, load, now)
        for begin in range(0, total, CHAIN):
            filled.tell(placement.worker, hashes[begin : begin + CHAIN])
            if placement.prefill is not None and begin >= cached:
                filled.tell(placement.prefill, hashes[begin : begin + CHAIN])
    return times


def dict_lookups(blocks: int, rng: random.Random) -> tuple[list[float], float]:
    """Times to find 512 cached blocks in a dict, and the bytes that one of its entries takes."""
    chains = []
    before = resident_bytes()
    table: dict[bytes, int] = {}
    for turn in range(blocks // CHAIN):
        packed = rng.randbytes(16 * CHAIN)
        table |= dict.fromkeys(split(packed), 1 << rng.randrange(256))
        if turn % max(1, blocks // CHAIN // 1000) == 0:
            chains.append(packed)
    entry_bytes = (resident_bytes() - before) / len(table)

    def find(hashes: Sequence[bytes]) -> None:
        holders = -1
        for block in hashes:
            holders &= table.get(block, 0)

    prompts = [split(packed) for packed in chains]
    return [timed(partial(find, hashes)) for hashes in prompts], entry_bytes


def split(packed: bytes) -> list[bytes]:
    """Hashes out of their concatenation."""
    return [packed[i : i + 16] for i in range(0, len(packed), 16)]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    report = Report("router-placement", vars(arguments))
    rng = random.Random(0)
    gc.collect()
    gc.freeze()  # as the router does once it has started
    gc.disable()

    def add(name: str, times: Sequence[float], goal: str = "") -> None:
        p50, p99 = np.percentile(times, [50, 99]) * 1e3
        report.add(f"{name}, p50", float(p50), "ms")
        report.add(f"{name}, p99", float(p99), "ms", goal=goal)

    def add_hashing(num_tokens: int) -> None:
        tokens = [rng.randrange(128_000) for _ in range(num_tokens)]
        root = root_hash(b"bench")
        times = [timed(lambda: hash_blocks(tokens, BLOCK_SIZE, root)) for _ in range(200)]
        add(f"hashing {num_tokens} tokens, before the choice", times)

    small = Filled(16, 100_000, rng)
    few = placements(small, 256, 512, arguments.repeats)
    filled = Filled(arguments.workers, arguments.blocks, rng)
    index = filled.placer.index
    report.add("indexed blocks", len(index), "")
    report.add("index memory per block", index.num_bytes / len(index), "bytes")
    add("event of 512 blocks while filling", filled.slowest_s)
    report.add("full garbage collection with that index", timed(gc.collect) * 1e3, "ms")
    for total in (32, 512, 8192):
        add_hashing(total * BLOCK_SIZE)
        times = placements(filled, total // 2, total, arguments.repeats)
        name = f"choice, {total * BLOCK_SIZE} tokens, half cached"
        add(name, times, "<= 1")
        report.add(f"{name}, slowest", max(times) * 1e3, "ms")
        if total == 512:
            many = times
    add("choice, 8192 tokens, half cached, 16 workers and 100 k blocks", few)
    ratio = float(np.median(many) / np.median(few))
    report.add("time at full size / with 16 workers and 100 k blocks", ratio, "x")
    # What was placed has filled the table by now, so that each event moves a part of it.
    events = [
        filled.tell(rng.choice(filled.workers), filled.fresh(EVENT_BLOCKS)) for _ in range(2000)
    ]
    add(f"event of {EVENT_BLOCKS} blocks, table growing", events)
    match_s = [timed(partial(index.match, each)) for each in map(split, filled.prompts)]
    add("looking up 512 cached blocks", match_s)
    dict_s, entry_bytes = dict_lookups(arguments.blocks, rng)
    add("a dict: looking up 512 cached blocks", dict_s)
    report.add("a dict: memory per block", entry_bytes, "bytes")
    report.add("dropping a worker", timed(lambda: filled.placer.drop("w7")) * 1e3, "ms")
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
