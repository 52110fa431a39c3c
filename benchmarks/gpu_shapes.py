"""Models that the GPU benchmarks serve, and the least that serving takes: bytes and operations.

Models are shapes with random weights; the folders made here hold a config.json and nothing else.
Bytes are those of bf16: what a step must read at least. Operations count a multiply-add as two.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = 2
"""Of a bf16 number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """What every layer of Qwen3-MoE has instead of one feed-forward."""

    count: int
    per_token: int
    intermediate_size: int

    def expected(self, num_tokens: int) -> float:
        """How many different ones so many tokens choose on average, if all are alike."""
        return self.count * (1 - (1 - self.per_token / self.count) ** num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder-only model."""

    title: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tied: bool = False
    eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    experts: Experts | None = None

    @property
    def linear_params(self) -> int:
        """Weights of all layers' products with one token, without embedding and LM head."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = 2 * queries + 2 * keys + 3 * self.intermediate_size
        if self.experts is not None:
            active = 3 * self.experts.per_token * self.experts.intermediate_size
            rows = 2 * queries + 2 * keys + self.experts.count + active
        return self.num_layers * self.hidden_size * rows

    @property
    def weight_bytes(self) -> int:
        """That a step of one token reads: all products and the LM head, not the embedding."""
        return BYTES * (self.linear_params + self.vocab_size * self.hidden_size)

    def step_weight_bytes(self, num_tokens: int) -> float:
        """That a step of so many tokens reads."""
        if self.experts is None:
            return self.weight_bytes
        more = self.experts.expected(num_tokens) - self.experts.per_token
        each = 3 * self.experts.intermediate_size * self.hidden_size
        return self.weight_bytes + BYTES * self.num_layers * more * each

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers."""
        return BYTES * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def decode_bytes(self, context_lens: Sequence[float]) -> float:
        """That one decode step reads with sequences of these lengths."""
        return self.step_weight_bytes(len(context_lens)) + self.kv_bytes_per_token * sum(
            context_lens
        )

    def prefill_flops(self, num_tokens: int) -> float:
        """Operations of one prompt: products, the causal half of attention, one row of logits."""
        attention = 2 * self.num_layers * self.num_heads * self.head_dim * num_tokens**2
        head = 2 * self.vocab_size * self.hidden_size
        return 2 * self.linear_params * num_tokens + attention + head

    def config(self, dtype: str) -> dict[str, Any]:
        """The config.json."""
        config = {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "hidden_act": "silu",
            "dtype": dtype,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
        }
        if self.experts is not None:
            config |= {
                "model_type": "qwen3_moe",
                "num_experts": self.experts.count,
                "num_experts_per_tok": self.experts.per_token,
                "moe_intermediate_size": self.experts.intermediate_size,
                "norm_topk_prob": True,
            }
        return config

    def write(self, folder: Path, dtype: str = "bfloat16") -> Path:
        """Make the model's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(dtype)))
        return folder


SHAPES = {
    "qwen3-0.6b": Shape(
        title="Qwen3-0.6B",
        architecture="Qwen3ForCausalLM",
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position=40_960,
        tied=True,
    ),
    "llama-3.1-8b": Shape(
        title="Llama-3.1-8B",
        architecture="LlamaForCausalLM",
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_position=131_072,
        eps=1e-5,
        rope_theta=500_000.0,
    ),
    "qwen3-8b": Shape(
        title="Qwen3-8B",
        architecture="Qwen3ForCausalLM",
        hidden_size=4096,
        intermediate_size=12_288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position=40_960,
    ),
    "qwen3-30b-a3b": Shape(
        title="Qwen3-30B-A3B",
        architecture="Qwen3MoeForCausalLM",
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=151_936,
        max_position=40_960,
        experts=Experts(count=128, per_token=8, intermediate_size=768),
    ),
    "tiny": Shape(
        title="tiny",
        architecture="Qwen3ForCausalLM",
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=512,
        max_position=2048,
        tied=True,
    ),
}
