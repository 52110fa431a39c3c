"""The whole engine against Hugging Face transformers, on small random models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.llm import LLM
from tests.support.models import make_checkpoint

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
LENGTHS = (1, 5, 16, 17, 40, 64, 90, 33)
NUM_NEW = 12
MOST_TIMES = 20
"""That the prompts are asked until some came back from host memory."""
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)


def prompts(vocab_size: int) -> list[list[int]]:
    """Of several lengths; every third begins like the one before."""
    generator = torch.Generator().manual_seed(1)
    made: list[list[int]] = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        if index % 3 == 2:
            shared = made[-1][: length - 1]
            ids[: len(shared)] = shared
        made.append(ids)
    return made


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    answers = []
    for prompt in prompts(model.config.vocab_size):
        whole = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
        )
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("whole", {}),
        ("chunks of 16", {"max_chunk_tokens": 16, "max_step_tokens": 64}),
        ("chunks of 7", {"max_chunk_tokens": 7, "max_step_tokens": 11}),
        ("preempted", {"num_blocks": 13, "max_step_tokens": 64}),
        ("uncached", {"prefix_caching": False}),
        ("from host memory", {"num_blocks": 16, "max_num_seqs": 1, "host_kv_bytes": 1 << 20}),
    ],
)
def test_greedy_tokens_equal_those_of_transformers(
    checkpoint: Path, expected: list[list[int]], name: str, limits: dict[str, int]
) -> None:
    config = EngineConfig(
        **{"model": str(checkpoint), "num_blocks": 64, "block_size": 8, "num_threads": 1, **limits}
    )
    llm = LLM(config)
    asked = prompts(llm.engine.vocab_size)
    try:
        for times in range(1, MOST_TIMES + 1):  # the second time from the prefix cache
            completions = llm.generate(asked, GREEDY)
            assert [list(each.token_ids) for each in completions] == expected
            llm.engine.check_integrity()
            stats = llm.engine.stats()
            # On a busy machine blocks may be evicted before their copies are made.
            if times > 1 and (stats.host.hit_tokens or name != "from host memory"):
                break
    finally:
        llm.close()
    assert (stats.host.hit_tokens > 0) == (name == "from host memory")
    assert (stats.preemptions > 0) == (name == "preempted")
    assert (stats.cached_tokens > 0) == (name != "uncached")


def test_seeded_tokens_are_the_same_alone_in_a_batch_and_after_preemption(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path)
    config = EngineConfig(model=str(folder), num_blocks=64, block_size=8, num_threads=1)
    llm = LLM(config)
    asked = prompts(llm.engine.vocab_size)
    sampling = [
        SamplingParams(max_tokens=NUM_NEW, temperature=1.0, top_p=0.9, seed=index, ignore_eos=True)
        for index in range(len(asked))
    ]
    alone = [
        llm.generate([prompt], params)[0].token_ids
        for prompt, params in zip(asked, sampling, strict=True)
    ]
    llm.close()
    crowded = LLM(replace(config, num_blocks=13, max_step_tokens=48))
    together = [each.token_ids for each in crowded.generate(asked, sampling)]
    preemptions = crowded.engine.stats().preemptions
    crowded.close()
    assert together == alone
    assert preemptions > 0
    assert len({tuple(each) for each in alone}) == len(alone)
