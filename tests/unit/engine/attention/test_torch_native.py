"""The backend against attention written out in full, over random mixes of spans."""

import math
import random

import pytest
import torch

from core.kv_layout import KvLayout
from engine.attention.interface import AttentionSpan
from engine.attention.torch_native import TorchNativeBackend
from engine.kv.pool import KVPool

LAYERS, HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 2, 6, 2, 8, 4, 400


def make_pool() -> KVPool:
    layout = KvLayout(
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        block_size=BLOCK,
        dtype="float32",
        block_bytes=LAYERS * 2 * KV_HEADS * BLOCK * DIM * 4,
    )
    return KVPool(layout, BLOCKS, torch.device("cpu"))


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One query row [Hq, D] over a context [S, Hkv, D]."""
    out = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        weights = torch.softmax(key[:, shared] @ query[head] / math.sqrt(DIM), 0)
        out.append(weights @ value[:, shared])
    return torch.cat(out)


@pytest.mark.parametrize("seed", range(4))
def test_forward_over_mixed_spans_equals_attention_written_out(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pool = make_pool()
    backend = TorchNativeBackend(pool, HEADS)
    free = list(range(BLOCKS))
    rng.shuffle(free)
    shapes = [(rng.choice([0, 3, 4, 9, 33]), rng.choice([1, 1, 1, 2, 5, 16])) for _ in range(9)]
    contexts = [torch.randn(LAYERS, 2, start + n, KV_HEADS, DIM) for start, n in shapes]
    tables = [[free.pop() for _ in range(-(-(start + n) // BLOCK))] for start, n in shapes]
    earlier = [
        AttentionSpan(0, start, table) for (start, _), table in zip(shapes, tables, strict=True)
    ]
    fill = backend.plan([span for span in earlier if span.length])
    spans = [
        AttentionSpan(start, n, table) for (start, n), table in zip(shapes, tables, strict=True)
    ]
    step = backend.plan(spans)
    for layer in range(LAYERS):
        before = [c[layer, :, :start] for c, (start, _) in zip(contexts, shapes, strict=True)]
        past = torch.cat([kv for kv in before if kv.shape[1]], 1)
        fill.forward(torch.randn(past.shape[1], HEADS, DIM), past[0], past[1], layer)
    for layer in range(LAYERS):
        new = torch.cat(
            [c[layer, :, start:] for c, (start, _) in zip(contexts, shapes, strict=True)], 1
        )
        query = torch.randn(new.shape[1], HEADS, DIM)
        out = step.forward(query, new[0], new[1], layer)
        row = 0
        for context, (start, n) in zip(contexts, shapes, strict=True):
            for i in range(n):
                key, value = context[layer, :, : start + i + 1]
                expected = reference(query[row], key, value)
                torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)
                row += 1


def test_forward_writes_only_the_slots_of_its_tokens() -> None:
    pool = make_pool()
    backend = TorchNativeBackend(pool, HEADS)
    step = backend.plan([AttentionSpan(5, 1, (7, 3)), AttentionSpan(2, 3, (9, 1))])
    key = torch.full((4, KV_HEADS, DIM), 1.0)
    step.forward(torch.ones(4, HEADS, DIM), key, key * 2, layer=1)
    expected = torch.zeros_like(pool.tensor)
    for block, offset in ((3, 1), (9, 2), (9, 3), (1, 0)):
        expected[block, 1, 0, :, offset] = 1.0
        expected[block, 1, 1, :, offset] = 2.0
    torch.testing.assert_close(pool.tensor, expected)


def test_plan_decodes_of_similar_length_share_a_call_and_others_do_not() -> None:
    backend = TorchNativeBackend(make_pool(), HEADS)
    table = tuple(range(40))
    similar = [AttentionSpan(start, 1, table) for start in (20, 24, 27, 28)]
    assert len(backend.plan(similar).pieces) == 1
    assert len(backend.plan([*similar, AttentionSpan(150, 1, table)]).pieces) == 2
