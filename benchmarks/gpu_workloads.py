"""What each model of the GPU benchmarks is asked to do."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu_shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """Requests that are all there at once, of random lengths."""

    requests: int = 256
    shortest: int = 100
    longest: int = 1024
    max_token: int = 10_000

    def draw(self) -> tuple[list[list[int]], list[int]]:
        """Prompts and how many tokens to generate for each.

        In this order of draws, as other engines' scripts make them: seed 0 means the same lengths
        and ids everywhere, 142,827 tokens in and 133,966 out.

        Source: nano-vllm's bench.py (MIT), in numbers only.
        """
        random.seed(0)
        draw = random.randint
        prompts = [
            [draw(0, self.max_token) for _ in range(draw(self.shortest, self.longest))]
            for _ in range(self.requests)
        ]
        return prompts, [draw(self.shortest, self.longest) for _ in prompts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one model is asked to do, and the engine's limits for it."""

    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    memory_share: float = 0.9
    offline: Offline | None = None
    decode_batches: tuple[int, ...] = ()
    decode_context: int = 4096
    decode_steps: int = 128
    prefill_tokens: int = 8192
    steady: tuple[tuple[int, int], ...] = ()
    """(batch, context) of decode that is watched."""
    steady_steps: int = 60


_LARGE = Workload(
    max_model_len=9000,
    max_num_seqs=64,
    max_step_tokens=8192,
    memory_share=0.92,
    decode_batches=(1, 64),
    steady=((64, 4096),),
)
WORKLOADS = {
    "qwen3-0.6b": Workload(
        max_model_len=4096,
        max_num_seqs=256,
        max_step_tokens=16_384,
        offline=Offline(),
        steady=((64, 550), (256, 550)),
    ),
    "llama-3.1-8b": _LARGE,
    "qwen3-8b": _LARGE,
    # Its weights leave less of 80 GB to KV.
    "qwen3-30b-a3b": replace(
        _LARGE, decode_batches=(1, 32), decode_context=2048, steady=((32, 2048),)
    ),
    "tiny": Workload(
        max_model_len=256,
        max_num_seqs=8,
        max_step_tokens=256,
        offline=Offline(requests=6, shortest=4, longest=16, max_token=500),
        decode_batches=(1, 4),
        decode_context=32,
        decode_steps=8,
        prefill_tokens=64,
        steady=((2, 16), (4, 16)),
        steady_steps=12,
    ),
}


def offline_floor_s(
    shape: Shape,
    lengths: Sequence[tuple[int, int]],
    *,
    bytes_per_s: float,
    flops_per_s: float,
) -> float:
    """Least seconds for (prompt, output) lengths that all start together, none preempted.

    Each step reads all weights once and the context of every sequence that still runs; prompts
    cost their operations and nothing else.
    """
    steps = max(output for _, output in lengths) - 1
    context = sum((output - 1) * (prompt + output / 2) for prompt, output in lengths)
    read = steps * shape.weight_bytes + shape.kv_bytes_per_token * context
    flops = sum(shape.prefill_flops(prompt) for prompt, _ in lengths)
    return read / bytes_per_s + flops / flops_per_s
