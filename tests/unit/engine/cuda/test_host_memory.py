"""Copies between a GPU's pool and pinned memory: the right bytes, beside whatever the GPU does."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from core.kv_layout import KvLayout
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.cuda.host_memory import StreamedHostMemory
from engine.executor import BlockCopy
from engine.kv.pool import KVPool
from engine.llm import LLM
from tests.support.models import make_checkpoint
from tests.support.process import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LAYOUT = KvLayout(
    num_layers=16,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
    dtype="bfloat16",
    block_bytes=1 << 20,
)
NUM_BLOCKS = 96


@pytest.fixture
def pool() -> Iterator[KVPool]:
    pool = KVPool(LAYOUT, NUM_BLOCKS, torch.device("cuda:0"))
    pool.tensor.normal_()
    pool.host_memory = StreamedHostMemory(pool, NUM_BLOCKS)
    torch.cuda.synchronize()
    yield pool
    pool.close()
    pool.close()


def finish(copy: BlockCopy) -> None:
    wait_until(lambda: copy.poll() is not None, 10, "the copy to end", lambda: "")


def test_blocks_go_out_and_come_back_to_other_places(pool: KVPool) -> None:
    assert pool.host_memory is not None
    before = pool.tensor.clone()
    out, back = list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS))
    random.shuffle(out)
    random.shuffle(back)
    finish(pool.host_memory.save(list(range(NUM_BLOCKS)), out))
    pool.tensor.zero_()
    torch.cuda.synchronize()
    finish(pool.host_memory.load(out, back))
    assert torch.equal(pool.tensor[back], before)


def test_copies_wait_for_no_step_and_starting_them_waits_for_nothing(pool: KVPool) -> None:
    memory = pool.host_memory
    assert memory is not None
    ids = list(range(NUM_BLOCKS))
    finish(memory.save(ids, ids))
    busy = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # seconds of the stream that steps run on
    busy.record()
    began_at = time.monotonic()
    copies = [memory.save(ids[:48], ids[:48]), memory.load(ids[48:], ids[48:])]
    assert time.monotonic() - began_at < 0.1
    for copy in copies:
        finish(copy)
    assert not busy.query(), "they were made after the step, not beside it"
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # without and with FlashInfer
def test_greedy_output_out_of_host_memory_is_that_of_a_large_pool(
    dtype: Literal["float32", "bfloat16"], tmp_path: Path
) -> None:
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    path = make_checkpoint(tmp_path, head_dim=128, **shape)
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 280) for _ in range(rng.randrange(60, 150))] for _ in range(9)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = []
    for limits in ({"num_blocks": 400}, {"num_blocks": 24, "host_kv_bytes": 256 << 20}):
        config = EngineConfig(
            model=str(path), device="cuda", dtype=dtype, max_step_tokens=64, **limits
        )
        llm = LLM(config)
        for _ in range(3):
            outputs.append([list(llm.generate([p], greedy)[0].token_ids) for p in prompts])
            llm.engine.check_integrity()
        brought_back = llm.engine.stats().host.hit_tokens
        llm.close()
    assert brought_back > 0
    assert outputs == [outputs[0]] * 6
