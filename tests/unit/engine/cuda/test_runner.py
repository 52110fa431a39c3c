"""The GPU runner against transformers, with itself without graphs, and for hidden waits."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.sampling import SamplingParams
from engine.build import build_executor
from engine.config import EngineConfig
from engine.cuda.runner import CudaRunner
from engine.executor import Executor
from engine.llm import LLM
from engine.plan import PENDING, Chunk, SampleSpec, ScoreSpec, StepPlan
from tests.support.models import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-odd": ("LlamaForCausalLM", {"hidden_size": 200, "intermediate_size": 300}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6}),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
}
EXPERT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"num_experts": 20, "moe_intermediate_size": 96}),
    "mixtral": ("MixtralForCausalLM", {}),
}
"""Where rounding may choose another expert, so that narrow types are as near as luck has it."""
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(params=CASES | EXPERT_CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    yield from fresh_checkpoint(request.param, tmp_path)


@pytest.fixture(params=CASES)
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    yield from fresh_checkpoint(request.param, tmp_path)


def fresh_checkpoint(case: str, tmp_path: Path) -> Iterator[Path]:
    arch, overrides = (CASES | EXPERT_CASES)[case]
    seed = random.SystemRandom().randrange(1 << 30)
    yield make_checkpoint(tmp_path, arch, seed=seed, **{**SHAPE, **overrides})
    torch.cuda.empty_cache()


def config(path: Path, **settings: Any) -> EngineConfig:
    defaults = {"num_blocks": 400, "max_num_seqs": 24, "max_step_tokens": 256}
    return EngineConfig(model=str(path), device="cuda", **{**defaults, **settings})


def prompts(count: int) -> list[list[int]]:
    rng = random.SystemRandom()
    return [[rng.randrange(3, 280) for _ in range(rng.randrange(1, 150))] for _ in range(count)]


def oracle(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda()


def prompt_logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    """Of a prompt's own tokens after the first, [T - 1], float32."""
    tokens = torch.tensor([prompt], device="cuda")
    values = torch.log_softmax(model(tokens).logits[0, :-1].float(), -1)
    return values.gather(1, tokens[0, 1:, None])[:, 0]


def forced_logits(executor: Executor, sequences: list[list[int]], num_prompt: int) -> torch.Tensor:
    """Logits after the prompts and each token that follows, [B, T - num_prompt + 1, vocab]."""
    assert isinstance(executor, CudaRunner)
    spec = SampleSpec(GREEDY, 0, (), ())
    size = executor.pool.layout.block_size
    tables: list[list[int]] = [[] for _ in sequences]
    steps = []
    for end in range(num_prompt, len(sequences[0]) + 1):
        start = 0 if end == num_prompt else end - 1
        chunks = []
        for i, tokens in enumerate(sequences):
            while len(tables[i]) * size < end:
                tables[i].append(i + len(sequences) * len(tables[i]))
            chunks.append(Chunk(str(i), tokens[start:end], start, tables[i], spec))
        run = executor._run_mixed if start == 0 else executor._run_decodes
        with torch.inference_mode():
            steps.append(run(chunks).logits.float())
    return torch.stack(steps, 1)


def test_greedy_float32_equals_transformers(checkpoint: Path) -> None:
    llm = LLM(config(checkpoint, dtype="float32"))
    given = prompts(6)
    model = oracle(checkpoint, torch.float32)
    sampling = replace(GREEDY, prompt_logprobs=0)
    for prompt, done in zip(given, llm.generate(given, sampling), strict=True):
        tokens = torch.tensor([[*prompt, *done.token_ids]], device="cuda")
        with torch.inference_mode():
            expected = model(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
            own = prompt_logprobs(model, prompt)
        assert list(done.token_ids) == expected.tolist()
        found = done.prompt_logprobs.logprobs if done.prompt_logprobs is not None else []
        assert list(found) == pytest.approx(own.tolist(), abs=1e-3)
    llm.close()


def test_prompt_logprobs_are_as_near_to_float32_as_those_of_transformers(dense: Path) -> None:
    llm = LLM(config(dense, dtype="bfloat16"))
    given = [prompt for prompt in prompts(12) if len(prompt) > 1]
    done = llm.generate(given, replace(GREEDY, prompt_logprobs=1))
    llm.close()
    ours = [value for one in done if one.prompt_logprobs for value in one.prompt_logprobs.logprobs]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = oracle(dense, dtype)
        with torch.inference_mode():
            found[dtype] = torch.cat([prompt_logprobs(model, prompt) for prompt in given])
    exact = found[torch.float32]
    error = (torch.tensor(ours, device="cuda") - exact).norm()
    assert error <= 1.5 * (found[torch.bfloat16] - exact).norm()


@pytest.mark.parametrize("count", [5, 70])  # with contexts split between programs, and whole
def test_bfloat16_is_as_near_to_float32_as_transformers_is(dense: Path, count: int) -> None:
    rng = random.SystemRandom()
    sequences = [[rng.randrange(3, 280) for _ in range(70)] for _ in range(count)]
    settings = config(dense, dtype="bfloat16", max_num_seqs=70, max_step_tokens=4096)
    executor = build_executor(settings)
    ours = forced_logits(executor, sequences, num_prompt=40)
    tokens = torch.tensor(sequences, device="cuda")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            found[dtype] = oracle(dense, dtype)(tokens).logits[:, 39:].float()
    exact = found[torch.float32]
    error = (ours - exact).norm() / exact.norm()
    theirs = (found[torch.bfloat16] - exact).norm() / exact.norm()
    assert error <= 1.1 * theirs, f"error {error:.2e}, of transformers {theirs:.2e}"
    executor.close()


def test_with_and_without_graphs_tokens_and_logprobs_are_bit_equal(checkpoint: Path) -> None:
    given = prompts(19)
    each = [
        SamplingParams(
            temperature=0.0 if i % 3 == 0 else 0.9,
            seed=i,
            max_tokens=30 + i,
            ignore_eos=True,
            logprobs=3 if i % 4 == 0 else None,
            top_p=0.9 if i % 5 == 0 else 1.0,
            prompt_logprobs=2 if i % 6 == 0 else None,
        )
        for i in range(len(given))
    ]
    outputs = []
    for cuda_graphs in (True, False):
        llm = LLM(config(checkpoint, dtype="bfloat16", cuda_graphs=cuda_graphs))
        done = llm.generate(given, each)
        outputs.append([(list(d.token_ids), list(d.logprobs), d.prompt_logprobs) for d in done])
        llm.engine.check_integrity()
        llm.close()
    assert outputs[0] == outputs[1]
    assert len({token for tokens, *_ in outputs[0] for token in tokens}) > 30


def test_nothing_is_built_once_it_serves(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(config(dense, dtype="bfloat16"))
    built: list[str] = []
    hooks = pytest.importorskip("triton").knobs.runtime
    monkeypatch.setattr(hooks, "jit_post_compile_hook", lambda **call: built.append(call["repr"]))
    rng = random.Random(8)
    prompts = [[rng.randrange(3, 280) for _ in range(rng.randint(1, 90))] for _ in range(40)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_p": 0.8},
        {"top_k": 5, "presence_penalty": 0.5},
        {"logit_bias": {7: 2.0}, "logprobs": 2},
    ]
    each = [
        SamplingParams(max_tokens=rng.randint(2, 20), ignore_eos=True, seed=i, **kinds[i % 4])
        for i in range(len(prompts))
    ]
    llm.generate(prompts, each)
    assert not built


def test_submitting_never_waits_for_the_device(checkpoint: Path) -> None:
    executor = build_executor(config(checkpoint, dtype="bfloat16"))
    tables = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    plain = SamplingParams(temperature=0.7)
    rich = SamplingParams(temperature=0.7, top_p=0.8, top_k=30, logprobs=4)

    def spec(params: SamplingParams, position: int) -> SampleSpec:
        return SampleSpec(params, position, (), ())

    plans = [
        [
            Chunk("a", [5] * 20, 0, tables[0], spec(plain, 0)),
            Chunk("b", [6] * 9, 0, tables[1], None, ScoreSpec(1, [6] * 8 + [7], 2)),
        ],
        [
            Chunk("a", [PENDING], 20, tables[0], spec(plain, 1)),
            Chunk("b", [7] * 8, 9, tables[1], spec(rich, 0)),
        ],
        [
            Chunk("a", [PENDING], 21, tables[0], spec(plain, 2)),
            Chunk("b", [PENDING], 17, tables[1], spec(rich, 1)),
            Chunk("c", [9], 0, tables[2], spec(rich, 0)),
        ],
    ]
    for _ in range(2):  # the first round compiles what sampling needs
        before = None
        for chunks in plans:
            torch.cuda.set_sync_debug_mode("error")
            try:
                step = executor.submit(StepPlan(chunks))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if before is not None:
                before.wait()
            before = step
        assert before is not None
        assert all(token is not None for token in before.wait().token_ids)
    executor.close()
