import mmap

import pytest
import torch

from core.errors import ConfigError
from core.kv_layout import KvLayout
from engine.config import EngineConfig
from engine.kv.pool import KVPool, num_pool_blocks

LAYOUT = KvLayout(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="bfloat16", block_bytes=768
)


def test_pool_blocks_lie_one_after_another_from_the_base_address() -> None:
    pool = KVPool(LAYOUT, 5, torch.device("cpu"))
    assert pool.tensor.shape == (5, 3, 2, 2, 4, 8)
    assert pool.tensor.dtype == torch.bfloat16
    assert pool.base_address % mmap.PAGESIZE == 0
    assert pool.device_id is None
    for block in range(5):
        address = pool.tensor[block].data_ptr()
        assert address == pool.base_address + block * LAYOUT.block_bytes
    assert not pool.tensor.any()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EngineConfig(model="m", num_blocks=7), 7),
        (EngineConfig(model="m", kv_cache_bytes=768 * 9 + 767), 9),
    ],
)
def test_num_pool_blocks_follows_the_setting(config: EngineConfig, expected: int) -> None:
    assert num_pool_blocks(config, LAYOUT) == expected


@pytest.mark.parametrize(
    "config",
    [EngineConfig(model="m", num_blocks=0), EngineConfig(model="m", kv_cache_bytes=767)],
)
def test_num_pool_blocks_without_room_for_one_is_refused(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"num_blocks|kv_cache_bytes"):
        num_pool_blocks(config, LAYOUT)
