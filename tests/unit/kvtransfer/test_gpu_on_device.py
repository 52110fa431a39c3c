"""READs between the pools of two processes on a GPU, whose driver does the copying."""

import random
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_kv_transfer import METADATA, POOL_BLOCKS, llama_layout, llama_pool
from engine.kv.pool import KVPool
from kvtransfer.gpu import GpuTransport
from kvtransfer.head_slices import plan_slices
from kvtransfer.stamps import PoolStamps
from kvtransfer.transport import ReadState
from tests.support.kv import finish
from tests.support.process import Process, frozen, running

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture
def peer() -> Iterator[tuple[Process, bytes]]:
    """A process whose block i holds the number i everywhere."""
    command = [sys.executable, "-m", "benchmarks.gpu_kv_transfer", "--serve", "cuda:0"]
    with running([*command, "--no-nixl"], name="GPU peer") as process:
        line = process.wait_for_line(METADATA, 60)
        yield process, bytes.fromhex(line.removeprefix(METADATA).split()[0])


def scattered(count: int) -> list[tuple[int, int]]:
    rng = random.Random(count)
    return list(
        zip(
            rng.sample(range(POOL_BLOCKS), count),
            rng.sample(range(POOL_BLOCKS), count),
            strict=True,
        )
    )


def holds(pool: KVPool, pairs: list[tuple[int, int]]) -> bool:
    found = pool.tensor[[own for _, own in pairs]].view(torch.int16)
    wanted = torch.tensor([remote for remote, _ in pairs], dtype=torch.int16, device=found.device)
    return bool((found == wanted.view(-1, 1, 1, 1, 1, 1)).all())


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_blocks_and_heads_of_a_rank_arrive(peer: tuple[Process, bytes], ranks: int) -> None:
    pool = llama_pool(torch.device("cuda:0"), ranks)
    (part,) = plan_slices(
        llama_layout(), llama_layout(), source_size=1, own_size=ranks, own_rank=ranks - 1
    )
    transport = GpuTransport(pool, token=b"", elsewhere=None)
    transport.connect("p", peer[1], part.pieces)
    for count in (1, 7, 300):
        pairs = scattered(count)
        pool.tensor.fill_(-1)
        torch.cuda.synchronize()
        read = transport.read("p", pairs)
        assert finish(read) is ReadState.DONE, read.error
        assert holds(pool, pairs)
        others = sorted(set(range(POOL_BLOCKS)) - {own for _, own in pairs})[:50]
        assert bool((pool.tensor[others] == -1).all())
    transport.close()


def test_a_frozen_or_dead_peer_needs_not_help(peer: tuple[Process, bytes]) -> None:
    process, metadata = peer
    pool = llama_pool(torch.device("cuda:0"))
    transport = GpuTransport(pool, token=b"", elsewhere=None)
    transport.connect("p", metadata)
    assert finish(transport.read("p", scattered(1))) is ReadState.DONE
    with frozen(process.pid):
        assert finish(transport.read("p", scattered(64))) is ReadState.DONE
        assert holds(pool, scattered(64))
        process.kill_group()
    pairs = scattered(65)
    assert finish(transport.read("p", pairs)) is ReadState.DONE
    assert holds(pool, pairs), "what is mapped stays"
    transport.disconnect("p")
    transport.close()


def test_a_stamp_in_device_memory_is_known_again() -> None:
    pool = llama_pool(torch.device("cuda:0"), 2)
    stamps = PoolStamps(pool, llama_layout(), rank=1, size=2)
    stamps.write(3, "probe/1")
    torch.cuda.synchronize()
    assert stamps.holds(3, "probe/1") and not stamps.holds(3, "probe/2")
    assert not stamps.holds(2, "probe/1")
    assert pool.tensor[3].any() and torch.isfinite(pool.tensor[3]).all()
