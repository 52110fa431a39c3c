"""Bytes and operations of the models against figures that were worked out elsewhere."""

from pathlib import Path

import pytest

from benchmarks.gpu_shapes import BYTES, SHAPES
from benchmarks.gpu_workloads import WORKLOADS, Offline, offline_floor_s
from engine.models.config import read_model_config


@pytest.mark.parametrize(
    ("name", "weight_gb", "kv_bytes"),
    [
        ("qwen3-0.6b", 1.192, 114_688),
        ("llama-3.1-8b", 15.01, 131_072),
        ("qwen3-8b", 15.14, 147_456),
    ],
)
def test_bytes_of_a_decode_step(name: str, weight_gb: float, kv_bytes: int) -> None:
    shape = SHAPES[name]
    assert shape.weight_bytes / 1e9 == pytest.approx(weight_gb, rel=1e-3)
    assert shape.kv_bytes_per_token == kv_bytes
    read = shape.decode_bytes([100.0, 28.0])
    assert read == shape.weight_bytes + 128 * kv_bytes


@pytest.mark.parametrize(
    ("name", "tokens", "tera"),
    [
        ("qwen3-0.6b", 1024, 1.3 * 0.79),
        ("qwen3-0.6b", 8192, 18.9 * 0.79),
        ("llama-3.1-8b", 1024, 18.4 * 0.79),
        ("llama-3.1-8b", 4096, 77.9 * 0.79),
        ("llama-3.1-8b", 8192, 132.0),
        ("qwen3-8b", 8192, 169 * 0.79),
    ],
)
def test_operations_of_a_prompt(name: str, tokens: int, tera: float) -> None:
    assert SHAPES[name].prefill_flops(tokens) / 1e12 == pytest.approx(tera, rel=0.04)


def test_linear_params_are_those_of_the_checkpoint() -> None:
    # 8.03 billion, of which embedding and head are 2 x 128256 x 4096 and norms next to nothing.
    shape = SHAPES["llama-3.1-8b"]
    all_params = shape.linear_params + 2 * shape.vocab_size * shape.hidden_size
    assert all_params == pytest.approx(8.03e9, rel=1e-3)


def test_a_step_reads_the_experts_that_its_tokens_choose() -> None:
    # 30.5 billion, 3.3 of them active with one token (as published, the embedding included).
    shape = SHAPES["qwen3-30b-a3b"]
    embedding = shape.vocab_size * shape.hidden_size
    assert shape.weight_bytes / BYTES + embedding == pytest.approx(3.35e9, rel=0.01)
    assert shape.step_weight_bytes(1) == pytest.approx(shape.weight_bytes)
    everything = shape.step_weight_bytes(10_000) / BYTES + embedding
    assert everything == pytest.approx(30.53e9, rel=1e-3)
    assert 0.85 < shape.decode_bytes([0.0] * 32) / shape.step_weight_bytes(10_000) < 0.9


def test_offline_draws_what_other_scripts_draw() -> None:
    prompts, outputs = Offline().draw()
    assert (len(prompts), sum(map(len, prompts)), sum(outputs)) == (256, 142_827, 133_966)
    assert Offline().draw() == (prompts, outputs)
    assert max(map(max, prompts)) <= 10_000


def test_floor_of_the_offline_work() -> None:
    prompts, outputs = Offline().draw()
    pairs = list(zip(map(len, prompts), outputs, strict=True))
    floor = offline_floor_s(SHAPES["qwen3-0.6b"], pairs, bytes_per_s=3.0e12, flops_per_s=798e12)
    assert 133_966 / floor == pytest.approx(25_800, rel=0.01)


def test_floor_counts_each_step_and_each_context() -> None:
    shape = SHAPES["tiny"]
    # Prompts of 10 and 20 tokens, 3 and 2 out: two decode steps, contexts 11 + 21, then 12.
    floor = offline_floor_s(shape, [(10, 3), (20, 2)], bytes_per_s=1.0, flops_per_s=float("inf"))
    assert floor == 2 * shape.weight_bytes + 44 * shape.kv_bytes_per_token


@pytest.mark.parametrize("name", SHAPES)
def test_engine_understands_each_model(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    folder = shape.write(tmp_path / name)
    config = read_model_config(folder)
    assert config.num_layers == shape.num_layers
    assert config.vocab_size == shape.vocab_size
    work = WORKLOADS[name]
    assert work.max_model_len <= shape.max_position
    assert all(
        context + 4 * work.steady_steps <= work.max_model_len and batch <= work.max_num_seqs
        for batch, context in work.steady
    )
