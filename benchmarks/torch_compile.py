"""Would torch.compile make the plain torch path faster? Two ways of using it, beside none.

    python -m benchmarks.torch_compile [--device cuda] [--dtype bfloat16] [--model FOLDER]

`elementwise` compiles norms, RoPE and gate and leaves products as they are; `pieces` compiles each
layer in two functions, up to attention and after it. Both see tensors only, so all layers share
what was compiled. Times are of whole steps through the executor: medians, with the first steps, in
which compiling happens, apart; variants take turns. Tokens are compared with those of no compiling,
which in 16 bits may differ: fused operations round less often.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn import functional

from benchmarks.report import Report, median
from core.sampling import SamplingParams
from engine.build import build_executor
from engine.config import EngineConfig
from engine.layers.context import ForwardContext, TorchContext
from engine.layers.decoder import DecoderLayer
from engine.layers.rope import rotate_
from engine.llm import LLM
from engine.plan import Chunk, SampleSpec, StepPlan

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
CONTEXT = 256
BLOCK_SIZE = 16
WARM_UP = 4
STEPS_AT_ONCE = 3
Layer = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def add_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream and its norm, [T, hidden_size] each."""
    if delta is not None:
        hidden = hidden + delta
    wide = hidden.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return hidden, (wide * scale).to(hidden.dtype) * weight


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * intermediate_size] -> [T, intermediate_size]."""
    first, second = gate_up.chunk(2, -1)
    return functional.silu(first) * second


def up_to_attention(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream, and rotated q and k with v."""
    hidden, normed = add_norm(hidden, delta, norm, eps)
    cos, sin, num_rotated = rope
    heads = functional.linear(normed, qkv).view(len(hidden), -1, cos.shape[-1])
    rotated = heads[:, :num_rotated].clone()
    rotate_(rotated, cos, sin)
    return hidden, torch.cat((rotated, heads[:, num_rotated:]), 1)


def after_attention(
    hidden: torch.Tensor,
    attended: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream and what the feed-forward adds to it."""
    output, gate_up, down = weights
    hidden, normed = add_norm(hidden, functional.linear(attended, output), norm, eps)
    return hidden, functional.linear(gate(functional.linear(normed, gate_up)), down)


def attend(qkv: torch.Tensor, context: TorchContext, layer: int) -> torch.Tensor:
    """Attention over rotated heads."""
    num_rotated = context.num_heads + context.num_kv_heads
    query, key = qkv[:, : context.num_heads], qkv[:, context.num_heads : num_rotated]
    return context.attention.forward(query, key, qkv[:, num_rotated:], layer)


def elementwise(layer: DecoderLayer, index: int) -> Layer:
    """A layer whose parts other than products and attention are compiled."""
    norm, rotate, gated = torch.compile(add_norm), torch.compile(rotate_), torch.compile(gate)

    def call(
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        context: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(context, TorchContext)
        eps = layer.input_norm.eps
        hidden, normed = norm(hidden, delta, layer.input_norm.weight, eps)
        qkv = layer.attention.qkv(normed).view(len(hidden), -1, context.cos.shape[-1])
        rotate(qkv[:, : context.num_heads + context.num_kv_heads], context.cos, context.sin)
        attended = attend(qkv, context, index)
        if rows is not None:
            attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
        added = layer.attention.output(attended)
        hidden, normed = norm(hidden, added, layer.mlp_norm.weight, eps)
        return hidden, layer.mlp.down(gated(layer.mlp.gate_up(normed)))

    return call


def pieces(layer: DecoderLayer, index: int) -> Layer:
    """A layer compiled in two functions."""
    before, after = torch.compile(up_to_attention), torch.compile(after_attention)

    def call(
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        context: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(context, TorchContext)
        eps = layer.input_norm.eps
        rope = (context.cos, context.sin, context.num_heads + context.num_kv_heads)
        qkv_weight = layer.attention.qkv.weight
        hidden, qkv = before(hidden, delta, layer.input_norm.weight, eps, qkv_weight, rope)
        attended = attend(qkv, context, index)
        if rows is not None:
            attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
        weights = (layer.attention.output.weight, layer.mlp.gate_up.weight, layer.mlp.down.weight)
        return after(hidden, attended, layer.mlp_norm.weight, eps, weights)

    return call


VARIANTS: dict[str, Callable[[DecoderLayer, int], Layer] | None] = {
    "not compiled": None,
    "elementwise": elementwise,
    "pieces": pieces,
}


def made(layers: list[Any], make: Callable[[DecoderLayer, int], Layer] | None) -> list[Any]:
    """The layers of one variant."""
    return layers if make is None else [make(layer, i) for i, layer in enumerate(layers)]


def prompt_step(num_tokens: int) -> StepPlan:
    """One prompt, all of it."""
    ids = [3 + 7 * i % 20_000 for i in range(num_tokens)]
    table = range(num_tokens // BLOCK_SIZE + 1)
    return StepPlan([Chunk("r0", ids, 0, table, SampleSpec(GREEDY, 0, (), ()))])


def decode_step(batch: int) -> StepPlan:
    """One token of each of `batch` sequences after CONTEXT tokens."""
    count = CONTEXT // BLOCK_SIZE + 1
    return StepPlan(
        [
            Chunk(
                f"r{i}",
                [5],
                CONTEXT,
                range(i * count, (i + 1) * count),
                SampleSpec(GREEDY, 0, (), ()),
            )
            for i in range(batch)
        ]
    )


def main() -> None:
    """Measure each variant on the same executor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    config = EngineConfig(
        model=arguments.model,
        load_format=arguments.load_format,
        device=arguments.device,
        dtype=arguments.dtype,
        attention_backend="torch_native",
        prefix_caching=False,
        max_model_len=4096,
    )
    executor = build_executor(config)
    layout = executor.pool.layout
    report = Report(f"torch-compile-{arguments.device}-{layout.dtype}", vars(arguments))
    model: Any = cast(Any, executor)._model
    assert all(layer.attention.norms is layer.attention.qkv.bias is None for layer in model.layers)
    plans = {
        "prompt of 512 tokens": prompt_step(512),
        "decode of 1": decode_step(1),
        "decode of 8": decode_step(8),
    }
    variants = {name: made(model.layers, make) for name, make in VARIANTS.items()}
    samples: dict[tuple[str, str], list[float]] = {}
    expected = None
    for name, layers in variants.items():
        model.layers = layers
        started = time.perf_counter()
        for plan in plans.values():
            for _ in range(WARM_UP):
                executor.submit(plan).wait()
        report.add(f"{name}: first {WARM_UP} steps of each", time.perf_counter() - started, "s")
        llm = LLM(config, executor=executor)
        tokens = [done.token_ids for done in llm.generate([[1, 2, 3, 4, 5], [9] * 40], GREEDY)]
        expected = expected or tokens
        report.add(f"{name}: same tokens", float(tokens == expected), "")
    for _ in range(arguments.rounds):  # in turns, so that a busy machine slows all of them
        for name, layers in variants.items():
            model.layers = layers
            for what, plan in plans.items():
                executor.submit(plan).wait()
                for _ in range(STEPS_AT_ONCE):
                    started = time.perf_counter()
                    executor.submit(plan).wait()
                    milliseconds = (time.perf_counter() - started) * 1e3
                    samples.setdefault((name, what), []).append(milliseconds)
    for (name, what), measured in samples.items():
        report.add(f"{name}: {what}", median(measured), "ms", samples=measured)
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
