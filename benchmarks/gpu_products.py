"""A layer's products on a GPU, with cuBLAS and with our kernels for few rows; attention left out.

    python -m benchmarks.gpu_products [--save]

Chains of all layers, each with weights of its own, so that the L2 cache helps nobody more than in
service: norm, qkv, preparation of q, k and v, output, norm, gate and up, gate, down. Captured as
one CUDA graph; microseconds per layer, median of its replays. The floor is reading the weights at
the rate of a plain copy. `engine/cuda/products.py` takes its limits from this table.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu_limits import COPY_BYTES, copy_rates, elapsed_s
from benchmarks.gpu_shapes import SHAPES, Shape
from benchmarks.report import Report, median
from engine.cuda.kernels.activation import silu_mul
from engine.cuda.kernels.few_rows import few_rows, suits
from engine.cuda.kernels.gemv import gemv
from engine.cuda.kernels.norm import add_rms_norm_
from engine.cuda.kernels.product import GATE_TILE, Product
from engine.cuda.kernels.qkv import prepare_qkv_

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODELS = ("qwen3-0.6b", "llama-3.1-8b")
REPLAYS = 12
POSITIONS = 4096
BLOCK_SIZE = 16
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights, [out, in] each."""

    norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def layers_of(shape: Shape) -> list[Layer]:
    """Random layers on the GPU."""
    query = shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size

    def matrix(*size: int) -> torch.Tensor:
        return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)

    return [
        Layer(
            torch.ones(hidden, device="cuda", dtype=torch.bfloat16),
            matrix(query + 2 * kv, hidden),
            matrix(hidden, query),
            matrix(2 * inner, hidden),
            matrix(hidden, inner),
        )
        for _ in range(shape.num_layers)
    ]


def own(x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False) -> torch.Tensor:
    """A product with our kernels."""
    product = Product(weight=weight, gated=gated)
    assert suits(product)
    out = x.new_empty(len(x), product.out_features)
    (gemv if len(x) == 1 else few_rows)(product, x, out)
    return out


def chain(
    shape: Shape, layers: Sequence[Layer], rows: int, product: Compute, gate: Compute
) -> None:
    """Queue all layers once."""
    device = torch.device("cuda")
    hidden = torch.ones(rows, shape.hidden_size, device=device, dtype=torch.bfloat16)
    delta = hidden.clone()
    cos_sin = torch.ones(POSITIONS, shape.head_dim, device=device)
    positions = torch.arange(rows, device=device, dtype=torch.int32)
    size = (rows // BLOCK_SIZE + 1, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    pool = torch.zeros(size, device=device, dtype=torch.bfloat16)
    query_size = shape.num_heads * shape.head_dim
    for layer in layers:
        qkv = product(add_rms_norm_(hidden, delta, layer.norm, 1e-6), layer.qkv)
        heads = qkv.view(rows, -1, shape.head_dim)
        prepare_qkv_(heads, None, cos_sin, positions, positions, pool)
        attended = qkv[:, :query_size].contiguous()
        normed = add_rms_norm_(hidden, product(attended, layer.output), layer.norm, 1e-6)
        delta = product(gate(normed, layer.gate_up), layer.down)


def replay_s(work: Callable[[], None]) -> list[float]:
    """Seconds of each replay of `work`, captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return [elapsed_s(graph.replay, "cuda") for _ in range(REPLAYS)]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep a JSON file in results/")
    arguments = parser.parse_args()
    gpu = {"name": torch.cuda.get_device_name()}
    report = Report("gpu-products", {"replays": REPLAYS}, gpu=gpu)
    copy = median(copy_rates("cuda", COPY_BYTES))
    variants: dict[str, tuple[Compute, Compute]] = {
        "cuBLAS": (
            functional.linear,
            lambda x, weight: silu_mul(functional.linear(x, weight), GATE_TILE),
        ),
        "own": (own, partial(own, gated=True)),
    }
    for name in MODELS:
        shape = SHAPES[name]
        layers = layers_of(shape)
        floor = 2 * shape.linear_params / shape.num_layers / copy
        report.add(f"{shape.title}, floor", 1e6 * floor, "us/layer")
        for rows in ROWS:
            for variant, (product, gate) in variants.items():
                times = replay_s(partial(chain, shape, layers, rows, product, gate))
                each = [1e6 * seconds / shape.num_layers for seconds in times]
                title = f"{shape.title}, {rows} rows, {variant}"
                report.add(title, median(each), "us/layer", samples=each)
        del layers
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
