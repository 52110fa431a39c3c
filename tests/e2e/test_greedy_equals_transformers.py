"""Greedy output through HTTP, router, prefill, transfer and decode equals transformers' own."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, cluster
from tests.support.oracle import Oracle
from tests.support.process import wait_until
from tests.support.prompts import CHATS, TEXTS

TINY_TOKENS = 24
SMOLLM2_TOKENS = 8
MIDDLING = range(100, 800)
"""Tokens of prompts that are neither short nor take many steps."""
WHOLE = 4096
PAIRWISE = [
    ("llama", "nixl", 16),
    ("llama", "tcp", 64),
    ("llama", "nixl", WHOLE),
    ("qwen2", "tcp", 16),
    ("qwen2", "nixl", 64),
    ("qwen3", "nixl", 16),
    ("qwen3-moe", "tcp", WHOLE),
]
"""Each kind of attention (the last two models have one) with each transport, and each transport
with each chunk. Each model with many chunks: tests/unit/engine/test_llm_oracle.py."""


@dataclass(frozen=True)
class Case:
    """A prompt, as a client sends it, and what must come back."""

    body: dict[str, Any]
    expected: list[int]
    num_prompt_tokens: int

    @property
    def prompt(self) -> Any:
        return self.body.get("prompt") or self.body["messages"]


def cases_of(oracle: Oracle, max_tokens: int, middling: range = range(0)) -> list[Case]:
    """All prompts but those whose number of tokens is `middling`."""
    common = {"max_tokens": max_tokens, "temperature": 0, "extra_body": {"return_token_ids": True}}
    prompts = [({"prompt": text}, oracle.tokenizer(text)["input_ids"]) for text in TEXTS]
    prompts += [({"messages": messages}, oracle.chat_ids(messages)) for messages in CHATS]
    return [
        Case({**body, **common}, oracle.greedy(ids, max_tokens, ignore_eos=False), len(ids))
        for body, ids in prompts
        if len(ids) not in middling
    ]


@pytest.fixture(scope="module")
def tiny_cases(tiny_models: dict[str, Path]) -> dict[str, list[Case]]:
    return {name: cases_of(Oracle(path), TINY_TOKENS) for name, path in tiny_models.items()}


@pytest.fixture(scope="module")
def smollm2_cases(smollm2: Path) -> list[Case]:
    """Tiny models are asked prompts of every length; here a token takes a hundred times longer."""
    cases = cases_of(Oracle(smollm2), SMOLLM2_TOKENS, MIDDLING)
    lengths = [case.num_prompt_tokens for case in cases]
    assert min(lengths) == 1 and max(lengths) > 800 and len(cases) > 16
    return cases


async def complete(client: Any, model: str, case: Case) -> list[int]:
    """Token ids of the answer, without an end-of-sequence id."""
    api = client.chat.completions if "messages" in case.body else client.completions
    response = await api.create(model=model, **case.body)
    choice = response.choices[0]
    ids = list(choice.token_ids)
    return ids[:-1] if choice.finish_reason == "stop" else ids


async def compare(system: Cluster, cases: Sequence[Case], at_once: int) -> None:
    limit = asyncio.Semaphore(at_once)
    async with system.async_openai() as client:
        model = (await client.models.list()).data[0].id

        async def check(case: Case) -> None:
            async with limit:
                ids = await complete(client, model, case)
            assert ids == case.expected, f"{str(case.prompt)[:80]!r} went another way"

        async with asyncio.TaskGroup() as group:
            for case in cases:
                group.create_task(check(case))


def check_system(system: Cluster, cases: Sequence[Case]) -> None:
    """16 at once without a prefix hit, and each alone with one; KV really moves."""
    asyncio.run(compare(system, cases, at_once=16))
    system.wait_balanced()
    asyncio.run(compare(system, cases, at_once=1))
    system.wait_balanced()
    wait_counted(system, "decode", "diptych_kv_transfer_bytes_total")
    wait_counted(system, "prefill", "diptych_prefix_cache_hit_tokens_total")
    assert metric(system, "decode", "diptych_kv_transfer_failures_total") == 0


def wait_counted(system: Cluster, role: str, name: str) -> None:
    """Until a counter is above zero; engines report once a second."""
    wait_until(lambda: metric(system, role, name) > 0, 10, name)


def metric(system: Cluster, role: str, name: str) -> float:
    """Sum of a metric over its labels, on the only worker of a role."""
    import httpx

    (worker,) = [one for one in system.workers if one.role == role]
    text = httpx.get(f"http://127.0.0.1:{worker.metrics_port}/metrics", timeout=5).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((f"{name}{{", f"{name} "))
    )


@pytest.mark.parametrize(("model", "transport", "chunk"), PAIRWISE)
def test_small_random_models(
    tiny_models: dict[str, Path],
    tiny_cases: dict[str, list[Case]],
    model: str,
    transport: str,
    chunk: int,
) -> None:
    worker = {"max_chunk_tokens": chunk, "max_step_tokens": max(chunk, 64)}
    with cluster(tiny_models[model], transport=transport, worker=worker) as system:
        check_system(system, tiny_cases[model])
        for one in system.workers:
            one.flush_cache()
        asyncio.run(compare(system, tiny_cases[model], at_once=1))
        system.wait_balanced()


def test_out_of_host_memory(
    tiny_models: dict[str, Path], tiny_cases: dict[str, list[Case]]
) -> None:
    """A pool that holds the longest prompt and little more, so that all others leave it."""
    cases = tiny_cases["llama"]
    longest = max(len(case.expected) + case.num_prompt_tokens for case in cases)
    worker = {"num_blocks": longest // 16 + 24, "host_kv_memory": "256MiB", "max_step_tokens": 64}
    with cluster(tiny_models["llama"], transport="tcp", worker=worker) as system:
        asyncio.run(compare(system, cases, at_once=4))
        system.wait_balanced()
        asyncio.run(compare(system, cases, at_once=1))
        system.wait_balanced()
        wait_counted(system, "prefill", "diptych_kv_tier_hit_tokens_total")
        rates = [worker["host_bytes_per_s"] for worker in system.get("/v1/fleet").json()["workers"]]
        assert all(rates), "each has told the router how fast it copies"


@pytest.mark.slow
def test_smollm2(smollm2: Path, smollm2_cases: list[Case]) -> None:
    """Trained weights, and steps as large as a user's."""
    worker = {"kv_cache_memory": "1GiB"}
    # On a busy machine the largest step takes longer than decode usually bears with.
    with cluster(smollm2, worker=worker, decode_worker={"peer_silence_s": 60}) as system:
        check_system(system, smollm2_cases)
