"""Several ranks compute what one does: the same tokens, through the whole engine."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.modelfile.description import read_tokenizer
from core.sampling import SamplingParams, StructuredOutput
from engine.config import EngineConfig
from engine.llm import LLM
from tests.support.models import make_checkpoint, make_gguf
from tests.support.oracle import Oracle

NUM_NEW = 10
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases, a vocabulary that does not divide": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "vocab_size": 387},
    ),
    "qwen2, one KV head on both ranks": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "qwen3-moe, three whole experts on each rank, a dense layer": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 32, "mlp_only_layers": [1]},
    ),
    "mixtral, half of each of three experts on each rank, an odd vocabulary": (
        "MixtralForCausalLM",
        {"num_local_experts": 3, "tie_word_embeddings": True, "vocab_size": 385},
    ),
}
WORDS = StructuredOutput(kind="regex", definition="([a-f]{2,7} )+")
LENGTHS = (1, 5, 16, 40, 64, 33)


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    made = [[rng.randrange(3, 300) for _ in range(length)] for length in LENGTHS]
    made[3][:16] = made[2]  # found in the prefix cache
    return made


def settings(path: Path, **changes: Any) -> EngineConfig:
    # Few blocks, so that sequences are preempted; small chunks beside decodes.
    config = EngineConfig(
        model=str(path),
        num_blocks=13,
        block_size=8,
        num_threads=2,
        max_chunk_tokens=16,
        max_step_tokens=48,
        rank_timeout_s=20.0,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, overrides = CASES[request.param]
    return make_checkpoint(tmp_path_factory.mktemp("model"), arch, seed=4, **overrides)


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Path) -> Iterator[LLM]:
    llm = LLM(settings(checkpoint, tensor_parallel_size=2, host_kv_bytes=1 << 20))
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def one_rank(checkpoint: Path) -> Iterator[LLM]:
    llm = LLM(settings(checkpoint))
    yield llm
    llm.close()


def test_greedy_tokens_equal_those_of_one_rank_and_of_transformers(
    checkpoint: Path, one_rank: LLM, two_ranks: LLM
) -> None:
    greedy = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True, logprobs=3)
    # The fourth is served from the prefix cache, the last two compute all of their prompts.
    sampling = [replace(greedy, prompt_logprobs=1 if i > 3 else None) for i in range(len(LENGTHS))]
    alone, shared = one_rank.generate(prompts(), sampling), two_ranks.generate(prompts(), sampling)
    oracle = Oracle(checkpoint)
    expected = [oracle.greedy(prompt, NUM_NEW, ignore_eos=True) for prompt in prompts()]
    assert [list(each.token_ids) for each in alone] == expected
    assert [list(each.token_ids) for each in shared] == expected
    for ours, theirs in zip(shared, alone, strict=True):
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
        if ours.prompt_logprobs is not None and theirs.prompt_logprobs is not None:
            told = ours.prompt_logprobs.logprobs
            assert told == pytest.approx(theirs.prompt_logprobs.logprobs, abs=1e-4)
    assert sum(each.prompt_logprobs is not None for each in shared) == 2
    assert len({token for tokens in expected for token in tokens}) > 10
    assert two_ranks.engine.stats().preemptions > 0
    two_ranks.engine.check_integrity()


def test_blocks_come_back_from_host_memory_on_every_rank(one_rank: LLM, two_ranks: LLM) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    expected = one_rank.generate(prompts()[3:], sampling)
    before = two_ranks.engine.stats().host
    for _ in range(2):
        for prompt, wanted in zip(prompts()[3:], expected, strict=True):
            (done,) = two_ranks.generate([prompt], sampling)
            assert list(done.token_ids) == list(wanted.token_ids)
    after = two_ranks.engine.stats().host
    assert after.hit_tokens > before.hit_tokens
    blocks = (after.hit_tokens - before.hit_tokens) // 8
    block_bytes = 2 * two_ranks.engine.pool.layout.block_bytes
    assert after.loaded_bytes - before.loaded_bytes == blocks * block_bytes
    two_ranks.engine.check_integrity()


def test_sampled_tokens_equal_those_of_one_rank(
    checkpoint: Path, one_rank: LLM, two_ranks: LLM
) -> None:
    sampling = [
        SamplingParams(max_tokens=NUM_NEW, temperature=0.8, top_p=0.9, seed=1),
        SamplingParams(max_tokens=NUM_NEW, temperature=1.2, top_k=20, seed=2, ignore_eos=True),
        SamplingParams(max_tokens=NUM_NEW, seed=3, repetition_penalty=1.3, min_tokens=4),
        SamplingParams(max_tokens=NUM_NEW, seed=4, frequency_penalty=1.0, presence_penalty=0.5),
        SamplingParams(max_tokens=NUM_NEW, temperature=0, logit_bias={7: 5.0, 9: -100.0}),
        SamplingParams(max_tokens=NUM_NEW, min_p=0.05, seed=5, structured=WORDS),
    ]
    alone = [each.token_ids for each in one_rank.generate(prompts(), sampling)]
    assert [each.token_ids for each in two_ranks.generate(prompts(), sampling)] == alone
    text = read_tokenizer(checkpoint).tokenizer.decode(alone[5])
    assert len(text) > 5 and set(text) <= set("abcdef ")


def test_a_rank_holds_its_heads_of_every_block(one_rank: LLM, two_ranks: LLM) -> None:
    whole, part = one_rank.engine.pool.layout, two_ranks.engine.pool.layout
    assert part == whole.with_heads(max(1, whole.num_kv_heads // 2))
    assert two_ranks.engine.pool.tensor.shape[3] == part.num_kv_heads
    assert two_ranks.engine.vocab_size == one_rank.engine.vocab_size


@pytest.mark.parametrize("form", ["dummy", "gguf", "fused"])
def test_other_forms_of_weights_are_shared_alike(tmp_path: Path, form: str) -> None:
    arch = "Phi3ForCausalLM" if form == "fused" else "LlamaForCausalLM"
    path = make_checkpoint(tmp_path, arch, vocab_size=387 if form == "dummy" else 384)
    config = settings(path)
    if form != "fused":
        model = make_gguf(path) if form == "gguf" else path
        config = replace(config, model=str(model), load_format=form)
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=0)
    logprobs = []
    for size in (1, 2):
        llm = LLM(replace(config, tensor_parallel_size=size))
        done = llm.generate([[5, 6, 7]], sampling)[0]
        logprobs.append([each.logprob for each in done.logprobs])
        assert len(done.token_ids) == 4
        llm.close()
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "arch",
    ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"],
)
def test_two_gpus_generate_what_one_does(arch: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    # Heads of a size that GPU kernels take.
    path = make_checkpoint(
        tmp_path, arch, vocab_size=387, hidden_size=256, intermediate_size=512, head_dim=64
    )
    config = settings(path, device="cuda:0", dtype="float32", num_blocks=64)
    assert greedy(config) == greedy(replace(config, tensor_parallel_size=2))


@pytest.mark.gpu
def test_two_gpus_generate_with_captured_collectives_what_they_do_without(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = make_checkpoint(
        tmp_path, vocab_size=387, hidden_size=256, intermediate_size=512, head_dim=64
    )
    config = settings(
        path, device="cuda:0", dtype="bfloat16", num_blocks=64, tensor_parallel_size=2
    )
    assert greedy(config) == greedy(replace(config, cuda_graphs=False))


def greedy(config: EngineConfig) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
    llm = LLM(config)
    try:
        return [list(each.token_ids) for each in llm.generate(prompts(), sampling)]
    finally:
        llm.close()
