"""The same seed gives the same tokens, whatever shares the batch and whichever worker runs it."""

import asyncio
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster, cluster

BODY: dict[str, Any] = {
    "prompt": "The sea was calm and",
    "max_tokens": 40,
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 1234,
    "frequency_penalty": 0.3,
    "extra_body": {"return_token_ids": True, "top_k": 50, "ignore_eos": True},
}


async def sample(system: Cluster, *, crowd: int) -> list[int]:
    """The seeded answer, with a crowd of other requests around it."""
    async with system.async_openai() as client:
        model = (await client.models.list()).data[0].id

        async def one(body: dict[str, Any]) -> list[int]:
            response = await client.completions.create(model=model, **body)
            return list(response.choices[0].token_ids)

        others = [
            one({**BODY, "prompt": f"{'Word ' * (i * 7 % 40)}number {i}", "seed": i})
            for i in range(crowd)
        ]
        answers = await asyncio.gather(one(BODY), *others)
    assert all(len(answer) == BODY["max_tokens"] for answer in answers)
    return answers[0]


def test_same_seed_same_tokens(plain: Cluster, tiny_llama: Path) -> None:
    alone = asyncio.run(sample(plain, crowd=0))
    again = asyncio.run(sample(plain, crowd=0))
    crowded = asyncio.run(sample(plain, crowd=24))
    plain.wait_balanced()
    other = asyncio.run(sample_seed(plain, 99))
    assert again == alone
    assert crowded == alone
    assert other != alone
    with cluster(tiny_llama, prefill=0, decode=1, transport="tcp") as system:
        assert asyncio.run(sample(system, crowd=3)) == alone


async def sample_seed(system: Cluster, seed: int) -> list[int]:
    async with system.async_openai() as client:
        model = (await client.models.list()).data[0].id
        response = await client.completions.create(model=model, **{**BODY, "seed": seed})
        return list(response.choices[0].token_ids)


def test_choices_of_one_seed_differ_from_each_other_and_repeat(plain: Cluster) -> None:
    client = plain.openai()
    model = client.models.list().data[0].id
    first = client.completions.create(model=model, n=3, **BODY)
    second = client.completions.create(model=model, n=3, **BODY)
    ids = [list(choice.token_ids) for choice in first.choices]
    assert ids == [list(choice.token_ids) for choice in second.choices]
    assert len({tuple(one) for one in ids}) == 3
    plain.wait_balanced()
    client.close()
