"""Random models that keep to a schema: through the whole engine, on both runners."""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from core.finish import FinishReason
from core.modelfile.description import read_tokenizer
from core.sampling import SamplingParams, StructuredOutput
from engine.config import EngineConfig
from engine.grammar.build import build_grammars
from engine.llm import LLM
from engine.models.config import read_model_config
from engine.parallel.executor import MultiProcessExecutor
from engine.parallel.group import Alone
from engine.parallel.pipe import Frame
from engine.parallel.plan_codec import PlanDecoder
from tests.support.models import make_checkpoint, make_gguf

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}
JSON = StructuredOutput(kind="json_schema", definition=json.dumps(SCHEMA))
WORDS = StructuredOutput(kind="regex", definition="([a-f]{2,5} ){3,6}")
PROMPTS = [[5, 6, 7], [8] * 21, [9, 3], [4, 4, 4, 4], [70] * 9]
SAMPLING = [
    SamplingParams(max_tokens=400, temperature=0, structured=JSON),
    SamplingParams(max_tokens=400, seed=3, top_k=9, logprobs=1, structured=JSON),
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=60, temperature=0, repetition_penalty=1.4, structured=WORDS),
    SamplingParams(max_tokens=7, temperature=0.7, min_tokens=7, structured=WORDS),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=7, num_hidden_layers=2)


def config_of(path: Path) -> EngineConfig:
    # Little room, so that some are preempted while a grammar holds them.
    return EngineConfig(
        model=str(path),
        block_size=16,
        num_blocks=24,
        max_num_seqs=4,
        max_step_tokens=19,
        max_model_len=384,
        num_threads=1,
    )


def generate(
    llm: LLM, path: Path, sampling: Sequence[SamplingParams] = tuple(SAMPLING)
) -> list[str]:
    done = llm.generate(PROMPTS, sampling)
    llm.engine.check_integrity()
    assert [one.finish_reason for one in done[:2]] == [FinishReason.STOP] * 2
    assert len(done[1].logprobs) == len(done[1].token_ids)
    assert done[4].finish_reason is FinishReason.LENGTH
    decode = read_tokenizer(path).tokenizer.decode
    return [decode(list(one.token_ids)) for one in done]


@pytest.fixture(scope="module")
def texts(path: Path) -> list[str]:
    llm = LLM(config_of(path))
    said = generate(llm, path)
    assert llm.engine.stats().preemptions
    return said


def test_what_is_said_is_what_was_asked_for(texts: list[str]) -> None:
    check_all(texts)


def check_all(texts: list[str]) -> None:
    for text in texts[:2]:
        found = json.loads(text)
        assert list(found) == ["name", "n", "tags"]
        assert found["name"] in ("ann", "bob") and 0 <= found["n"] <= 99
    assert texts[0] != texts[1]
    assert re.fullmatch(WORDS.definition, texts[3])
    assert re.fullmatch("([a-f]{2,5} )*[a-f]{0,5}", texts[4])


def test_a_gguf_file_says_the_same(path: Path, texts: list[str]) -> None:
    gguf = make_gguf(path)
    assert generate(LLM(config_of(gguf)), gguf) == texts


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")
def test_the_gpu_runner_says_the_same_planning_ahead(path: Path) -> None:
    pytest.importorskip("triton")
    from tests.support.cuda import build_cuda_runner_on_cpu

    sampling = [
        SamplingParams(max_tokens=8, temperature=0, structured=WORDS),
        SamplingParams(max_tokens=6, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=8, seed=2, top_p=0.9, structured=WORDS),
    ]
    expected = LLM(config_of(path)).generate(PROMPTS[:3], sampling)
    runner = build_cuda_runner_on_cpu(path, config_of(path))
    assert runner.overlaps
    done = LLM(config_of(path), executor=runner).generate(PROMPTS[:3], sampling)
    assert [one.token_ids for one in done] == [one.token_ids for one in expected]


@pytest.mark.gpu
def test_a_gpu_keeps_to_a_schema_with_graphs_and_without(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    pytest.importorskip("flashinfer")
    # Heads of a size that GPU kernels take.
    path = make_checkpoint(
        tmp_path, vocab_size=387, hidden_size=256, intermediate_size=512, head_dim=64
    )
    config = EngineConfig(model=str(path), device="cuda:0", dtype="bfloat16", num_blocks=256)
    # Room for all the white space that a schema allows: nobody knows what this model says.
    roomy = [
        replace(each, max_tokens=900) if each.structured == JSON else each for each in SAMPLING
    ]
    said = []
    for cuda_graphs in (True, False):
        llm = LLM(replace(config, cuda_graphs=cuda_graphs))
        said.append(generate(llm, path, roomy))
        llm.close()
        check_all(said[-1])
    assert said[0] == said[1]


class _SilentRanks:
    """Takes what rank 0 sends, and reads it as another rank does."""

    def __init__(self) -> None:
        self.decoder = PlanDecoder()
        self.masks: list[list[int]] = []

    def step(self) -> nullcontext[None]:
        return nullcontext()

    def send(self, kind: Frame, body: bytes) -> None:
        for chunk in self.decoder.decode(body).chunks:
            if chunk.sample is not None and chunk.sample.mask is not None:
                self.masks.append(chunk.sample.mask.words().tolist())

    def begin_close(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")
def test_other_ranks_get_the_masks_of_steps_that_are_planned_ahead(path: Path) -> None:
    pytest.importorskip("triton")
    from tests.support.cuda import build_cuda_runner_on_cpu

    sampling = SamplingParams(max_tokens=6, temperature=0, structured=WORDS)
    config, ranks = config_of(path), _SilentRanks()
    (expected,) = LLM(config).generate(PROMPTS[:1], sampling)
    executor = MultiProcessExecutor(build_cuda_runner_on_cpu(path, config), Alone(), ranks)  # type: ignore[arg-type]
    (done,) = LLM(config, executor=executor).generate(PROMPTS[:1], sampling)
    executor.close()
    assert done.token_ids == expected.token_ids
    assert len(ranks.masks) == 6
    for mask, token_id in zip(ranks.masks, done.token_ids, strict=True):
        assert mask[token_id // 32] >> token_id % 32 & 1


def test_without_a_tokenizer_there_is_no_structured_output(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    config = EngineConfig(model=str(tmp_path), load_format="dummy")
    assert build_grammars(config, read_model_config(tmp_path)) is None
    assert "no tokenizer.json" in caplog.text


def test_a_library_that_is_missing_is_said_at_the_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("xgrammar", "llguidance"):
        monkeypatch.setitem(sys.modules, name, None)
    assert build_grammars(EngineConfig(model=str(path)), read_model_config(path)) is None
    assert "llguidance is not installed" in caplog.text
    config = EngineConfig(model=str(path), grammar_backend="xgrammar")
    with pytest.raises(ConfigError, match="xgrammar is not installed"):
        build_grammars(config, read_model_config(path))
