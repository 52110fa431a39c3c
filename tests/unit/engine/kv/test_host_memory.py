from collections.abc import Iterator

import pytest
import torch

from core.errors import ConfigError
from core.kv_layout import KvLayout
from engine.config import EngineConfig
from engine.executor import BlockCopy
from engine.kv.host_memory import (
    ThreadedHostMemory,
    check_host_settings,
    make_host_memory,
    num_host_blocks,
)
from engine.kv.pool import KVPool
from tests.support.process import wait_until

LAYOUT = KvLayout(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="bfloat16", block_bytes=768
)


@pytest.fixture
def pool() -> Iterator[KVPool]:
    pool = KVPool(LAYOUT, 6, torch.device("cpu"))
    pool.tensor.copy_(torch.randn(pool.tensor.shape))
    pool.host_memory = make_host_memory(EngineConfig(model="m", host_kv_bytes=4 * 768), pool)
    yield pool
    pool.close()


def finish(copy: BlockCopy) -> None:
    wait_until(lambda: copy.poll() is not None, 10, "the copy to end", lambda: "")


def test_blocks_go_to_host_memory_and_come_back_to_other_places(pool: KVPool) -> None:
    memory = pool.host_memory
    assert isinstance(memory, ThreadedHostMemory)
    assert (memory.num_blocks, memory.block_bytes) == (4, 768)
    before = pool.tensor.clone()
    finish(memory.save([5, 0, 3], [2, 0, 3]))
    pool.tensor[[5, 0, 3]] = 0
    finish(memory.load([3, 2, 0], [1, 5, 4]))
    assert torch.equal(pool.tensor[[1, 5, 4]], before[[3, 5, 0]])
    assert torch.equal(pool.tensor[2], before[2])
    assert not pool.tensor[[0, 3]].any()


def test_close_waits_for_what_is_under_way_and_may_come_twice(pool: KVPool) -> None:
    memory = pool.host_memory
    assert memory is not None
    copies = [memory.save([0, 1, 2], [0, 1, 2]) for _ in range(50)]
    pool.close()
    assert all(copy.poll() is not None for copy in copies)
    pool.close()


def test_without_the_setting_there_is_none() -> None:
    pool = KVPool(LAYOUT, 1, torch.device("cpu"))
    assert make_host_memory(EngineConfig(model="m"), pool) is None


@pytest.mark.parametrize("size", [767, 1 << 62], ids=["below a block", "beyond the machine"])
def test_a_size_that_makes_no_sense_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="give at least the 768"):
        num_host_blocks(EngineConfig(model="m", host_kv_bytes=size), LAYOUT)


def test_ranks_share_what_the_setting_says() -> None:
    config = EngineConfig(model="m", host_kv_bytes=8 * 768, tensor_parallel_size=2)
    assert num_host_blocks(config, LAYOUT) == 4


def test_without_a_prefix_cache_it_is_refused() -> None:
    check_host_settings(EngineConfig(model="m", prefix_caching=False))
    with pytest.raises(ConfigError, match="host_kv_memory"):
        check_host_settings(EngineConfig(model="m", host_kv_bytes=1 << 20, prefix_caching=False))
