"""Steps computed by hand-made plans against transformers in float32."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.sampling import SamplingParams
from engine.build import build_executor
from engine.config import EngineConfig
from engine.executor import Executor
from engine.plan import Chunk, SampleSpec, StepPlan
from tests.support.models import make_checkpoint
from tests.support.oracle import Oracle

WINDOW = 24
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-mha": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "LlamaForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6}),
    "qwen2-yarn": (
        "Qwen2ForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3-moe-some-dense": (
        "Qwen3MoeForCausalLM",
        {
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
            "num_experts_per_tok": 2,
        },
    ),
    # Heads of which hidden_size is not made up, as Nemo's; a window that the longest just fits.
    "mistral": ("MistralForCausalLM", {"head_dim": 32, "sliding_window": 82}),
    "phi3": (
        "Phi3ForCausalLM",
        {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 96},
    ),
    "mixtral": ("MixtralForCausalLM", {"sliding_window": None}),
}
GREEDY = SamplingParams(temperature=0, logprobs=5)


class Sequence:
    """One sequence driven through an executor, with blocks of its own."""

    def __init__(self, index: int, prompt: list[int], block_size: int, max_blocks: int) -> None:
        self.id = str(index)
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.num_computed = 0
        self.logprobs: list[Any] = []
        # Scattered, so that a mix-up of block ids can't stay unseen.
        self.blocks = [index + 7 * i for i in range(max_blocks)]
        self.block_size = block_size

    def chunk(self, limit: int) -> Chunk:
        ids = self.tokens[self.num_computed : self.num_computed + limit]
        end = self.num_computed + len(ids)
        position = len(self.tokens) - self.num_prompt
        sample = SampleSpec(GREEDY, position, (), ()) if end == len(self.tokens) else None
        return Chunk(
            self.id, ids, self.num_computed, self.blocks[: -(-end // self.block_size)], sample
        )


def run(executor: Executor, sequences: list[Sequence], chunk: int, steps: int) -> None:
    """Prefill in chunks while others decode, until each has `steps` tokens."""
    while True:
        active = [s for s in sequences if len(s.tokens) - s.num_prompt < steps]
        if not active:
            return
        chunks = [s.chunk(chunk) for s in active]
        result = executor.submit(StepPlan(chunks)).wait()
        for sequence, done, token, logprobs in zip(
            active, chunks, result.token_ids, result.logprobs, strict=True
        ):
            sequence.num_computed += len(done.token_ids)
            assert (token is None) == (done.sample is None)
            if token is not None:
                sequence.tokens.append(token)
                sequence.logprobs.append(logprobs)


@pytest.fixture(scope="module")
def oracle_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


@pytest.mark.parametrize("case", CASES)
def test_executor_greedy_tokens_and_logprobs_equal_transformers(
    case: str, tmp_path: Path, oracle_class: Any
) -> None:
    arch, overrides = CASES[case]
    path = make_checkpoint(tmp_path, arch, seed=3, **overrides)
    oracle = oracle_class.from_pretrained(path, dtype=torch.float32)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 300) for _ in range(n)] for n in (17, 70, 1, 16, 5)]
    for block_size, chunk in ((16, 1000), (8, 16), (4, 7)):
        executor = build_executor(
            EngineConfig(model=str(path), block_size=block_size, num_blocks=200, num_threads=1)
        )
        sequences = [Sequence(i, p, block_size, 26) for i, p in enumerate(prompts)]
        run(executor, sequences, chunk, steps=12)
        for sequence in sequences:
            expected, logits = _greedy(oracle, sequence.tokens, sequence.num_prompt)
            assert sequence.tokens[sequence.num_prompt :] == expected
            for row, logprobs in zip(logits.log_softmax(-1), sequence.logprobs, strict=True):
                for token_id, value in logprobs.top:
                    assert value == pytest.approx(float(row[token_id]), abs=1e-4)
                assert logprobs.logprob == logprobs.top[0][1]
        outputs = {token for s in sequences for token in s.tokens[s.num_prompt :]}
        assert len(outputs) > 8, "the model repeats itself too much to tell anything"


def _greedy(oracle: Any, tokens: list[int], num_prompt: int) -> tuple[list[int], torch.Tensor]:
    """What the oracle would choose after each prefix of `tokens` that ends in the output."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([tokens])).logits[0, num_prompt - 1 : -1]
    return logits.argmax(-1).tolist(), logits


@pytest.mark.parametrize("arch", ["MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"])
def test_sequences_end_where_a_sliding_window_would_begin_to_hide(
    arch: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, arch, seed=3, sliding_window=WINDOW)
    sliding = Oracle(path)
    unbounded = Oracle(make_checkpoint(tmp_path / "unbounded", arch, seed=3, sliding_window=None))
    rng = random.Random(1)
    ids = [rng.randrange(3, 300) for _ in range(WINDOW + 1)]
    torch.testing.assert_close(sliding.logits(ids[:WINDOW]), unbounded.logits(ids[:WINDOW]))
    assert not torch.allclose(sliding.logits(ids), unbounded.logits(ids), atol=0.01)

    told: list[str] = []
    config = EngineConfig(model=str(path), block_size=8, num_blocks=30, num_threads=1)
    executor = build_executor(config, told.append)
    assert executor.model_config.max_position == WINDOW
    assert any(f"up to {WINDOW} tokens" in line and "sliding_window" in line for line in told)
    sequence = Sequence(0, ids[: WINDOW - 8], 8, 4)
    run(executor, [sequence], WINDOW, steps=8)
    assert sequence.tokens[-8:] == sliding.greedy(ids[: WINDOW - 8], 8, ignore_eos=True)
    with pytest.raises(ConfigError, match=f"sliding_window .* at most {WINDOW}"):
        build_executor(replace(config, max_model_len=WINDOW + 1))
