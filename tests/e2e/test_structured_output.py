"""Structured output through router, prefill and decode over NIXL, by the openai client."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.cluster import Cluster, Worker, cluster, stream_events
from tests.support.process import wait_until

PROMPT = "The keeper of the lighthouse wrote in her log: " * 6
MAX_TOKENS = 900
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob"]},
        "sure": {"type": "boolean"},
        "days": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 9,
            "maxItems": 12,
        },
    },
    "required": ["name", "sure", "days"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "entry", "schema": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def system(slow_llama: Path) -> Iterator[Cluster]:
    with cluster(
        slow_llama,
        decode=2,
        worker={"stall_after_s": "3s"},
        router={"worker_silence_s": "2s", "request_timeout_s": "60s"},
    ) as running:
        yield running
        running.wait_balanced()


def check(text: str) -> None:
    entry = json.loads(text)
    assert list(entry) == ["name", "sure", "days"]
    assert entry["name"] in ("ann", "bob") and entry["sure"] in (True, False)
    assert 9 <= len(entry["days"]) <= 12
    assert all(isinstance(day, int) and 0 <= day <= 99 for day in entry["days"])


def chat(client: openai.OpenAI, **options: Any) -> Any:
    fields: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    return client.chat.completions.with_raw_response.create(**fields | options)


def text(client: openai.OpenAI, **options: Any) -> str:
    choice = chat(client, **options).parse().choices[0]
    assert choice.finish_reason == "stop"
    return str(choice.message.content)


def test_a_schema_holds_streamed_and_not_across_the_hand_over(client: openai.OpenAI) -> None:
    raw = chat(client, response_format=FORMAT)
    whole = raw.parse().choices[0]
    assert raw.headers["x-diptych-mode"] == "disaggregated"
    check(whole.message.content)
    assert whole.finish_reason == "stop"
    chunks = [
        chunk.choices[0] for chunk in chat(client, response_format=FORMAT, stream=True).parse()
    ]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": r"\d{3}-[a-f]{4}"}, r"\d{3}-[a-f]{4}"),
        ({"guided_choice": ["red", "grün"]}, "red|grün"),
        ({"ebnf": 'root ::= "a" ("b" | "c"){2,5} "d"'}, "a[bc]{2,5}d"),
        ({"structured_outputs": {"regex": "x+yz"}, "logit_bias": {"88": -50}}, "x+yz"),
    ],
)
def test_other_structures_hold(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, text(client, extra_body=fields))


def test_choices_share_a_grammar_and_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "n": 3,
        "temperature": 1.0,
        "seed": 4,
        "presence_penalty": 0.5,
        "logprobs": True,
        "response_format": FORMAT,
    }
    first, again = (chat(client, **options).parse() for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    for choice in first.choices:
        check(choice.message.content)
        assert len(choice.logprobs.content) > 10
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in again.choices] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_is_a_400_that_says_why(
    client: openai.OpenAI, system: Cluster, stream: bool
) -> None:
    # Met elsewhere: Bad requests counted as failures of workers: one bad client took the
    # fleet down.
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "record"}}}
    with pytest.raises(openai.BadRequestError, match="record"):
        chat(client, response_format=bad, stream=stream)
    assert retries(system) == 0
    system.wait_balanced()


def retries(system: Cluster) -> float:
    lines = system.get("/metrics").text.splitlines()
    return sum(float(x.split()[1]) for x in lines if x.startswith("diptych_router_retries_total{"))


def test_a_worker_that_dies_mid_structure_changes_nothing(system: Cluster) -> None:
    body = {
        "model": system.get("/v1/models").json()["data"][0]["id"],
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": 11,
        "json_schema": SCHEMA,
        "stream": True,
    }
    expected = "".join(_stream(system, body))
    check(expected)
    said, victim = "", None
    for part in _stream(system, body):
        said += part
        if len(said) > 20 and victim is None:
            victim = wait_until(lambda: _busy(system), 30, "a worker to be busy")
            victim.kill()
    assert said == expected


def _busy(system: Cluster) -> Worker | None:
    return next((worker for worker in system.decode if worker.describe().load.running), None)


def _stream(system: Cluster, body: dict[str, Any]) -> Iterator[str]:
    with httpx.stream("POST", f"{system.url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for event in stream_events(response):
            yield event["choices"][0]["text"]
