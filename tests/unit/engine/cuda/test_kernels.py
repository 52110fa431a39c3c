"""Kernels against torch, on the GPU where there is one and in triton's interpreter elsewhere."""

from collections.abc import Callable

import pytest
import torch

from core.kv_layout import KvLayout
from engine.kv.pool import KVPool
from engine.layers.rope import rotate_

pytest.importorskip("triton")
from engine.cuda.kernels.activation import silu_mul
from engine.cuda.kernels.few_rows import few_rows, workspace_of
from engine.cuda.kernels.gemv import gemv
from engine.cuda.kernels.norm import add_rms_norm_, rms_norm
from engine.cuda.kernels.product import Product, alternated
from engine.cuda.kernels.qkv import prepare_qkv_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
HALF_TOLERANCE = 2e-3


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def reference_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight.double()


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE.get(got.dtype, HALF_TOLERANCE)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 96), (3, 1000)])
def test_rms_norm_equals_its_definition(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, size, dtype=dtype), normal(size, dtype=dtype)
    assert_near(rms_norm(x, weight, 1e-5), reference_norm(x, weight, 1e-5))
    heads = normal(rows, 4, size, dtype=dtype)
    assert_near(rms_norm(heads, weight, 1e-5), reference_norm(heads, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_rms_norm_adds_in_place_and_normalises_the_sum(dtype: torch.dtype) -> None:
    hidden, delta, weight = normal(4, 200, dtype=dtype), normal(4, 200, dtype=dtype), normal(200)
    total = hidden + delta
    normed = add_rms_norm_(hidden, delta, weight.to(dtype), 1e-6)
    assert_near(hidden, total.double())
    assert_near(normed, reference_norm(total, weight.to(dtype), 1e-6))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_mul_gates(dtype: torch.dtype) -> None:
    gate_up = normal(3, 2 * 1500, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    assert_near(silu_mul(gate_up), expected)
    tiled = torch.stack((gate.view(3, -1, 30), up.view(3, -1, 30)), 2).reshape(3, -1)
    assert_near(silu_mul(tiled.to(dtype), 30), expected)


HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""The interpreter has no product of bfloat16 matrices."""


def check_product(
    compute: Callable[[Product, torch.Tensor, torch.Tensor], None],
    rows: int,
    size: int,
    columns: int,
    **traits: bool,
) -> None:
    """Compare with the definition in float64, on fresh random numbers."""
    gated = traits.get("gated", False)
    count = columns * (2 if gated else 1)
    x = normal(rows, size, dtype=HALF)
    weight = (torch.randn(count, size, device=DEVICE) / size**0.5).to(HALF)
    bias = normal(count, dtype=HALF) if traits.get("biased") else None
    out = torch.full((rows, columns), float("nan"), device=DEVICE, dtype=HALF)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if gated:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
        weight, bias = alternated(weight), None if bias is None else alternated(bias)
    compute(Product(weight=weight, bias=bias, gated=gated), x, out)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (1e-2 if torch.bfloat16 == HALF else 2e-3)
    torch.testing.assert_close(out.double(), expected, atol=0.1, rtol=0.1)


TRAITS = [{}, {"biased": True}, {"gated": True}, {"gated": True, "biased": True}]


@pytest.mark.parametrize("traits", TRAITS)
@pytest.mark.parametrize(("size", "columns"), [(64, 64), (4096, 32), (3000, 96), (100, 32)])
def test_gemv_is_the_product(size: int, columns: int, traits: dict[str, bool]) -> None:
    check_product(gemv, 1, size, columns, **traits)


@pytest.mark.parametrize("traits", TRAITS)
@pytest.mark.parametrize(
    ("rows", "size", "columns"),
    [(2, 128, 64), (16, 512, 64), (31, 1024, 128), (64, 256, 192), (100, 2048, 64)],
)
def test_few_rows_is_the_product_and_leaves_the_workspace_clean(
    rows: int, size: int, columns: int, traits: dict[str, bool]
) -> None:
    for _ in range(2):
        check_product(few_rows, rows, size, columns, **traits)
        assert not workspace_of(DEVICE).arrived.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_prepare_qkv_normalises_rotates_and_writes_only_its_slots(
    tokens: int, normed: bool, dtype: torch.dtype
) -> None:
    heads, kv_heads, dim, block, blocks, layers = 6, 2, 16, 4, 40, 2
    layout = KvLayout(
        num_layers=layers,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=block,
        dtype=str(dtype).removeprefix("torch."),
        block_bytes=layers * 2 * kv_heads * block * dim * dtype.itemsize,
    )
    pool = KVPool(layout, blocks, DEVICE)
    qkv = normal(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    weights = (normal(dim, dtype=dtype), normal(dim, dtype=dtype))
    positions = torch.randint(0, 50, (tokens,), device=DEVICE, dtype=torch.int32)
    slots = torch.randperm(blocks * block, device=DEVICE)[:tokens].to(torch.int32)
    slots[0] = -1
    angles = torch.outer(torch.arange(50.0), torch.rand(dim // 2)).to(DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)

    expected = qkv.double()
    rotated = expected[:, : heads + kv_heads]
    if normed:
        rotated[:, :heads] = reference_norm(rotated[:, :heads], weights[0], 1e-6)
        rotated[:, heads:] = reference_norm(rotated[:, heads:], weights[1], 1e-6)
    at = cos_sin[positions.long()].double()[:, None]
    cos, sin = at[..., : dim // 2], at[..., dim // 2 :]
    rotate_(rotated, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    prepare_qkv_(
        qkv, (*weights, 1e-6) if normed else None, cos_sin, positions, slots, pool.tensor[:, 1]
    )
    assert_near(qkv, expected)
    written = torch.zeros_like(pool.tensor, dtype=torch.float64)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            target = written[slot // block, 1, :, :, slot % block]
            target[0] = expected[token, heads : heads + kv_heads]
            target[1] = expected[token, heads + kv_heads :]
    assert_near(pool.tensor, written)
