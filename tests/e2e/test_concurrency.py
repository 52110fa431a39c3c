"""Many streams at once on few cores: none lost, none mixed up."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, cluster
from tests.support.oracle import Oracle

STREAMS = 64


def prompt_of(index: int) -> str:
    return f"Stream {index}: " + "the tide turns and " * (index * 13 % 37)


def length_of(index: int) -> int:
    return 4 + index * 11 % 60


async def stream(client: Any, model: str, index: int) -> list[int]:
    ids: list[int] = []
    finish = None
    events = await client.completions.create(
        model=model,
        prompt=prompt_of(index),
        max_tokens=length_of(index),
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    async for event in events:
        assert finish is None, "an event came after the end"
        choice = event.choices[0]
        ids += getattr(choice, "token_ids", None) or []
        finish = choice.finish_reason
    assert finish == "length"
    return ids


async def all_streams(system: Cluster) -> list[list[int]]:
    async with system.async_openai() as client:
        model = (await client.models.list()).data[0].id
        return await asyncio.gather(*(stream(client, model, i) for i in range(STREAMS)))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    oracle = Oracle(tiny_llama)
    return [
        oracle.greedy(oracle.tokenizer(prompt_of(i))["input_ids"], length_of(i), ignore_eos=True)
        for i in range(STREAMS)
    ]


def test_64_streams_of_mixed_lengths(tiny_llama: Path, expected: list[list[int]]) -> None:
    with cluster(tiny_llama, prefill=2, decode=2) as system:
        got = asyncio.run(all_streams(system))
        system.wait_balanced()
    assert got == expected


def test_a_pool_too_small_for_all_serves_them_in_turn(
    tiny_llama: Path, expected: list[list[int]]
) -> None:
    """Blocks run out on both sides: prompts wait, sequences are preempted, all end right."""
    with cluster(tiny_llama, worker={"num_blocks": 160}) as system:
        got = asyncio.run(all_streams(system))
        system.wait_balanced()
    assert got == expected
