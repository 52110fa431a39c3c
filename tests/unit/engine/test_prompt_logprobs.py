"""Log probabilities of prompts against transformers in float32, however the prompt is computed."""

from functools import partial
from pathlib import Path

import pytest
import torch

from core.sampling import SamplingParams
from core.tokens import PromptLogprobs
from engine.config import EngineConfig
from engine.engine import Engine
from engine.llm import LLM
from tests.support.engine import MakeEngine, make_request
from tests.support.fake_executor import kv_of, score_of
from tests.support.models import make_checkpoint
from tests.support.oracle import Oracle

GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
SCORED = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, prompt_logprobs=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def assert_exact(found: PromptLogprobs | None, oracle: Oracle, prompt: list[int]) -> None:
    assert found is not None and (found.first, found.end) == (1, len(prompt))
    with torch.inference_mode():
        expected = torch.log_softmax(oracle._model(torch.tensor([prompt])).logits[0, :-1], -1)
    own = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    assert list(found.logprobs) == pytest.approx(own[:, 0].tolist(), abs=1e-4)
    assert list(found.ranks) == ((expected > own).sum(1) + 1).tolist()
    top = expected.topk(3)
    for position, (ids, values) in enumerate(zip(top.indices, top.values, strict=True), 1):
        assert [each for each, _ in found.top(position, 3)] == ids.tolist()
        assert [each for _, each in found.top(position, 3)] == pytest.approx(
            values.tolist(), abs=1e-4
        )


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_logprobs_are_those_of_transformers(checkpoint: Path, chunk: int) -> None:
    prompts = [[3 + i % 200 for i in range(150)], [9, 8, 7], [5, 6]]
    config = EngineConfig(
        model=str(checkpoint), device="cpu", num_blocks=64, max_chunk_tokens=chunk
    )
    with LLM(config) as llm:
        llm.generate(prompts[:1], GREEDY)  # so that there is something cached to be ignored
        plain = llm.generate([*prompts, [4] * 20], GREEDY)
        sampling = [SCORED] * 3 + [GREEDY]
        scored = llm.generate([*prompts, [4] * 20], sampling)
        one = llm.generate([[5]], SCORED)
    oracle = Oracle(checkpoint)
    for prompt, done in zip(prompts, scored, strict=False):
        assert_exact(done.prompt_logprobs, oracle, prompt)
        assert done.num_cached_tokens == 0
    assert [done.token_ids for done in scored] == [done.token_ids for done in plain]
    assert scored[3].prompt_logprobs is None and one[0].prompt_logprobs is None


def reported(engine: Engine, request_id: str) -> list[PromptLogprobs]:
    """What a run says of a prompt; the engine is at rest then."""
    found = []
    for _ in range(200):
        if not engine.has_work:
            return found
        for output in engine.step().outputs:
            if output.request_id == request_id and output.prompt_logprobs is not None:
                found.append(output.prompt_logprobs)
        engine.check_integrity()
    raise AssertionError("still at work")


def assert_told_once(parts: list[PromptLogprobs], prompt: list[int]) -> None:
    assert [part.first for part in parts] == [1, *(part.end for part in parts[:-1])]
    kv = kv_of(prompt)
    expected = [score_of(*pair) for pair in zip(kv, prompt[1:], strict=False)]
    assert [value for part in parts for value in part.logprobs] == expected


def test_preempted_prompt_tells_each_position_once(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=8, max_chunk_tokens=1)
    prompt = [8 + i for i in range(16)]
    engine.add(make_request("old", [7] * 9, max_tokens=20))
    while engine.num_computed("old") < 9:
        engine.step()
    engine.add(make_request("young", prompt, max_tokens=3, prompt_logprobs=0))
    parts = reported(engine, "young")
    assert engine.stats().preemptions
    assert_told_once(parts, prompt)


def test_cached_prompt_is_computed_again_and_shared_by_others(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    prompt = [3 + i for i in range(14)]
    run_all = partial(reported, engine)
    engine.add(make_request("first", prompt))
    assert run_all("first") == []
    engine.add(make_request("scored", prompt, prompt_logprobs=0))
    engine.add(make_request("beside", prompt))
    assert_told_once(run_all("scored"), prompt)
    assert engine.stats().cached_tokens == 12  # of the one beside
    assert engine.stats().held_blocks == 0
