"""The GPU runner's host side: what it makes of plans, with the step before still under way."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.llm import LLM, Completion
from tests.support.models import make_checkpoint

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here; test_runner.py has the same"
)


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("LlamaForCausalLM", {}),
        ("Qwen3MoeForCausalLM", {"tie_word_embeddings": True, "mlp_only_layers": [1]}),
    ],
)
def test_generates_what_the_torch_runner_does(
    arch: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    from tests.support.cuda import build_cuda_runner_on_cpu

    path = make_checkpoint(tmp_path, arch, seed=7, num_hidden_layers=2, **overrides)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 280) for _ in range(n)] for n in (1, 5, 16, 30, 13, 3)]
    each = [
        SamplingParams(
            temperature=(0.0, 0.8)[i % 2],
            seed=i,
            max_tokens=7 + i,
            ignore_eos=True,
            logprobs=2 if i == 3 else None,
            prompt_logprobs=i if i in (3, 4) else None,
            repetition_penalty=1.3 if i == 4 else 1.0,
        )
        for i in range(len(prompts))
    ]
    # Little room, so that prompts come in chunks beside decodes and some are preempted.
    config = EngineConfig(
        model=str(path),
        block_size=4,
        num_blocks=17,
        max_num_seqs=5,
        max_step_tokens=19,
        num_threads=1,
    )
    plain = LLM(config)
    expected = plain.generate(prompts, each)
    assert plain.engine.stats().preemptions
    runner = build_cuda_runner_on_cpu(path, config)
    assert runner.overlaps
    if not overrides:
        runner.warm_up(lambda _: None)
    ahead = LLM(config, executor=runner)
    done = ahead.generate(prompts, each)
    assert [tokens(one) for one in done] == [tokens(one) for one in expected]
    for got, wanted in zip(done[3].logprobs, expected[3].logprobs, strict=True):
        assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
    for got, wanted in zip(done[3:5], expected[3:5], strict=True):
        ours, theirs = got.prompt_logprobs, wanted.prompt_logprobs
        assert ours is not None and theirs is not None
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert (ours.end, ours.ranks) == (theirs.end, theirs.ranks)
        assert ours.top_ids == theirs.top_ids and len(ours.top_ids) == ours.num_top * (ours.end - 1)
    ahead.engine.check_integrity()


@pytest.mark.parametrize(("rows", "step_tokens"), [(1, 1), (2, 3)])
def test_the_smallest_steps_can_be_rehearsed(tmp_path: Path, rows: int, step_tokens: int) -> None:
    from tests.support.cuda import build_cuda_runner_on_cpu

    path = make_checkpoint(tmp_path, "LlamaForCausalLM", num_hidden_layers=1)
    config = EngineConfig(
        model=str(path),
        block_size=1,
        num_blocks=8,
        max_num_seqs=rows,
        max_step_tokens=step_tokens,
        num_threads=1,
    )
    runner = build_cuda_runner_on_cpu(path, config)
    runner.warm_up(lambda _: None)
    runner.close()


def tokens(completion: Completion) -> list[int]:
    return list(completion.token_ids)
