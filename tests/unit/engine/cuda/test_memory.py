"""How the KV pool's size follows from a GPU's memory, on numbers; no GPU is asked."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from core.kv_layout import KvLayout
from engine.cuda.memory import GpuMemory, affordable_blocks, explained

GIB = 1 << 30
LAYOUT = KvLayout(
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
    dtype="bfloat16",
    block_bytes=2 << 20,
)
H100 = GpuMemory(total=80 * GIB, free=63 * GIB, own=17 * GIB)
"""With the weights of an 8B model on it."""
GPU = torch.device("cuda", 0)


def blocks(memory: GpuMemory = H100, **changes: float) -> int:
    values = {"utilization": 0.9, "step_bytes": GIB, "num_graphs": 0, "max_len": 1, **changes}
    return affordable_blocks(LAYOUT, memory, **values)  # type: ignore[arg-type]


def test_pool_gets_what_the_share_leaves_beside_weights_and_the_largest_step() -> None:
    # 0.9 * 80 - 17 - 1 GiB - 256 MiB of slack, in blocks of 2 MiB.
    assert blocks() == (54 * 1024 - 256) // 2


def test_graphs_and_larger_steps_take_from_the_pool() -> None:
    assert blocks(num_graphs=16) == blocks() - 16 * 8 // 2
    assert blocks(step_bytes=3 * GIB) == blocks() - 1024


def test_engines_that_share_a_gpu_get_equal_pools_whichever_comes_first() -> None:
    alone = blocks(utilization=0.45)
    second = replace(H100, free=H100.free - int(0.45 * H100.total))
    assert blocks(second, utilization=0.45) == alone


def test_no_more_is_taken_than_is_free() -> None:
    crowded = replace(H100, free=11 * GIB)
    assert blocks(crowded) == (10 * 1024 - 256) // 2


def test_one_sequence_of_the_longest_length_must_fit() -> None:
    count = blocks()
    assert blocks(max_len=count * 16) == count
    with pytest.raises(ConfigError) as caught:
        blocks(max_len=count * 16 + 1)
    message = str(caught.value)
    assert f"Set max_model_len to at most {count * 16}, raise gpu_memory_utilization" in message
    assert "gpu_memory_utilization 0.9" in message
    for part in ("80.0 GiB", "take 72.0", "CUDA take 17.0", "computing 1.2", "processes 0.0"):
        assert part in message


def test_where_nothing_fits_no_length_is_proposed() -> None:
    with pytest.raises(ConfigError, match=r"0\.0 GiB .* 0 tokens.*\. Raise gpu_memory") as caught:
        blocks(replace(H100, free=GIB, own=15 * GIB))
    assert "other processes 64.0" in str(caught.value)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, 90])
def test_share_must_be_one(share: float) -> None:
    with pytest.raises(ConfigError, match=f"above 0 and up to 1, got {share}"):
        blocks(utilization=share)


@given(
    total=st.integers(1, 200 * GIB),
    free=st.floats(0, 1),
    own=st.floats(0, 1),
    utilization=st.floats(0.01, 1),
    step_bytes=st.integers(0, 8 * GIB),
    num_graphs=st.integers(0, 40),
)
def test_what_is_promised_is_there_and_within_the_share(
    total: int, free: float, own: float, utilization: float, step_bytes: int, num_graphs: int
) -> None:
    memory = GpuMemory(total=total, free=int(total * free), own=int(total * own))
    try:
        count = affordable_blocks(
            LAYOUT,
            memory,
            utilization=utilization,
            step_bytes=step_bytes,
            num_graphs=num_graphs,
            max_len=16,
        )
    except ConfigError:
        return
    needed = count * LAYOUT.block_bytes + step_bytes
    assert needed <= memory.free
    assert memory.own + needed <= total * utilization


def memory_now(device: torch.device) -> GpuMemory:
    assert device == GPU
    return replace(H100, free=3 * GIB // 2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    ],
)
def test_running_out_says_when_where_and_what_to_change(error: Exception) -> None:
    with (
        pytest.raises(ConfigError) as caught,
        explained("loading the weights", GPU, memory_now),
    ):
        raise error
    message = str(caught.value)
    assert "cuda:0 ran out of memory while loading the weights: 1.5 of 80.0 GiB" in message
    for remedy in ("tensor_parallel_size", "max_step_tokens", "max_num_seqs"):
        assert remedy in message
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), explained("x", GPU, memory_now):
        raise error


def test_nothing_is_asked_while_all_goes_well() -> None:
    with explained("loading the weights", torch.device("cpu"), memory_now):
        pass
