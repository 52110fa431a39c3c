"""What an OpenAI client meets, through the whole system."""

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cluster import Cluster, cluster, stream_events
from tests.support.oracle import Oracle
from tests.support.process import wait_until

MESSAGES: list[dict[str, str]] = [{"role": "user", "content": "Tell me of the sea."}]


@pytest.fixture(scope="module")
def system(tiny_llama: Path) -> Iterator[Cluster]:
    # Soon again: another test's prompt may have cut the first measurement of a link short.
    with cluster(tiny_llama, decode_worker={"probe_interval_s": 0.5}) as running:
        yield running
        running.wait_balanced()


def ids_of(choice: Any) -> list[int]:
    return list(choice.token_ids)


def test_streamed_and_whole_answers_are_the_same(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {
        "model": model,
        "messages": MESSAGES,
        "max_tokens": 30,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**options)
    events = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **options
        )
    )
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    streamed = events[-1].usage
    assert whole.usage is not None and streamed is not None
    assert whole.usage.completion_tokens == streamed.completion_tokens == 30
    assert whole.usage.total_tokens == streamed.total_tokens
    assert not events[-1].choices


def test_cached_tokens_are_those_that_were_not_computed(
    client: openai.OpenAI, model: str, system: Cluster
) -> None:
    # Met elsewhere: cached_tokens was the whole prompt, and log probabilities of the prompt
    # were lost.
    for worker in system.workers:
        worker.flush_cache()
    prompt = "Never seen before: " + "abc " * 40
    usages = [
        client.completions.create(model=model, prompt=prompt, max_tokens=2, temperature=0).usage
        for _ in range(2)
    ]
    assert usages[0] and usages[0].prompt_tokens_details
    assert usages[1] and usages[1].prompt_tokens_details
    assert usages[0].prompt_tokens_details.cached_tokens == 0
    cached = usages[1].prompt_tokens_details.cached_tokens
    assert cached == (usages[1].prompt_tokens - 1) // 16 * 16


def test_stop_string_ends_the_answer_before_itself(
    client: openai.OpenAI, model: str, system: Cluster
) -> None:
    options: dict[str, Any] = {"model": model, "prompt": "The", "max_tokens": 60, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[10:14]
    cut = client.completions.create(stop=[stop, "never there"], **options)
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage and cut.usage.prompt_tokens_details
    assert cut.usage.prompt_tokens_details.cached_tokens is not None
    system.wait_balanced()


def test_stop_token_id_and_max_tokens(client: openai.OpenAI, model: str) -> None:
    extra = {"return_token_ids": True, "ignore_eos": True}
    options: dict[str, Any] = {"model": model, "prompt": "The", "max_tokens": 40, "temperature": 0}
    free = ids_of(client.completions.create(extra_body=extra, **options).choices[0])
    stop = free[7]
    ended = client.completions.create(
        extra_body={**extra, "stop_token_ids": [stop]}, **options
    ).choices[0]
    assert ids_of(ended) == free[: free.index(stop) + 1]
    assert ended.finish_reason == "stop"
    one = client.completions.create(extra_body=extra, **{**options, "max_tokens": 1}).choices[0]
    assert ids_of(one) == free[:1] and one.finish_reason == "length"


def test_logprobs_are_those_of_the_oracle(
    client: openai.OpenAI, model: str, tiny_llama: Path
) -> None:
    import torch

    response = client.chat.completions.create(
        model=model,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=5,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    oracle = Oracle(tiny_llama)
    prompt = oracle.chat_ids(MESSAGES)
    ids = ids_of(response.choices[0])
    with torch.inference_mode():
        logits = oracle._model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    logprobs = response.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    for row, token, entry in zip(expected, ids, logprobs.content, strict=True):
        assert math.isclose(entry.logprob, float(row[token]), abs_tol=1e-3)
        top = [one.logprob for one in entry.top_logprobs]
        assert top == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)


def test_logprobs_of_the_prompt_are_those_of_the_oracle(
    client: openai.OpenAI, model: str, system: Cluster, tiny_llama: Path
) -> None:
    """The prompt comes in chunks and in several messages, is cached, and its KV moves."""
    import torch

    oracle = Oracle(tiny_llama)
    prompt = [3 + (i * i) % 200 for i in range(1500)]
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "n": 2}
    extra = {"return_token_ids": True, "ignore_eos": True}
    plain = httpx.post(f"{system.url}/v1/completions", json={**body, **extra}).json()
    scored = {**body, **extra, "echo": True, "logprobs": 1, "prompt_logprobs": 3}
    answer = httpx.post(f"{system.url}/v1/completions", json=scored, timeout=60)
    assert answer.headers["x-diptych-mode"] == "disaggregated"
    with torch.inference_mode():
        expected = torch.log_softmax(oracle._model(torch.tensor([prompt])).logits[0, :-1], -1)
    own = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    ranks = ((expected > own).sum(1) + 1).tolist()
    top = expected.topk(3)
    for choice, before in zip(answer.json()["choices"], plain["choices"], strict=True):
        assert choice["token_ids"] == before["token_ids"]
        values = choice["logprobs"]["token_logprobs"]
        assert values[0] is None and len(values) == len(prompt) + 4
        assert values[1 : len(prompt)] == pytest.approx(own[:, 0].tolist(), abs=1e-4)
        none, *entries = choice["prompt_logprobs"]
        assert none is None and len(entries) == len(prompt) - 1
        for position, entry in enumerate(entries):
            token_id, rank = str(prompt[position + 1]), ranks[position]
            assert (next(iter(entry)), entry[token_id]["rank"]) == (token_id, rank)
            ids, values = top.indices[position].tolist(), top.values[position].tolist()
            wanted = dict(zip(map(str, ids), values, strict=True))
            found = {each: one["logprob"] for each, one in entry.items()}
            del found[token_id]
            wanted.pop(token_id, None)
            assert found == pytest.approx(wanted, abs=1e-4)
    alone = client.completions.create(
        model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert alone.logprobs is not None and alone.logprobs.token_logprobs is not None
    assert alone.logprobs.token_logprobs[1:] == pytest.approx(own[:, 0].tolist(), abs=1e-4)
    system.wait_balanced()


def test_bias_penalties_and_filters_reach_the_sampler(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "prompt": "The", "max_tokens": 24}
    extra = {"return_token_ids": True, "ignore_eos": True}

    def ids(**more: Any) -> list[int]:
        body = {**extra, **more.pop("extra", {})}
        return ids_of(client.completions.create(**options, **more, extra_body=body).choices[0])

    assert set(ids(temperature=0, logit_bias={"77": 100})) == {77}
    greedy = ids(temperature=0)
    assert ids(temperature=1.5, extra={"top_k": 1}) == greedy
    assert ids(temperature=1.5, top_p=1e-6) == greedy
    assert ids(temperature=1.5, extra={"min_p": 1.0}) == greedy
    forced = {"70": 50, "71": 50, "72": 50, "73": 49.5}
    loop = ids(temperature=0, logit_bias=forced)
    spread = ids(temperature=0, logit_bias=forced, frequency_penalty=2.0)
    assert len(set(loop)) < len(set(spread))
    assert ids(temperature=1.0, seed=5) == ids(temperature=1.0, seed=5) != greedy


def test_several_prompts_and_choices_are_kept_apart(client: openai.OpenAI, model: str) -> None:
    prompts = ["The sea", "A river runs", "Fire"]
    together = client.completions.create(
        model=model, prompt=prompts, n=2, max_tokens=8, temperature=0
    )
    assert [choice.index for choice in together.choices] == list(range(6))
    for index, prompt in enumerate(prompts):
        alone = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
        for choice in together.choices[2 * index : 2 * index + 2]:
            assert choice.text == alone.choices[0].text


def test_stream_of_several_choices_carries_all_of_them(client: openai.OpenAI, model: str) -> None:
    finishes: dict[int, str] = {}
    for event in client.chat.completions.create(
        model=model,
        messages=MESSAGES,  # type: ignore[arg-type]
        n=3,
        max_tokens=6,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        for choice in event.choices:
            if choice.finish_reason:
                assert choice.index not in finishes
                finishes[choice.index] = choice.finish_reason
    assert finishes == dict.fromkeys(range(3), "length")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"top_q": 1}, "top_q"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_wrong_input_names_its_field(
    system: Cluster, model: str, change: dict[str, Any], param: str
) -> None:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 4, **change}
    response = httpx.post(f"{system.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_too_long_a_prompt_says_both_lengths(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt=[65] * 9000, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    assert ("9000" in str(refused.value) and "5824" in str(refused.value)) or "8192" in str(
        refused.value
    )


def test_unknown_model_names_the_served_one(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match=model):
        client.completions.create(model="gpt-9", prompt="x")


def test_timeline_accounts_for_every_millisecond(
    client: openai.OpenAI, model: str, system: Cluster
) -> None:
    response = client.chat.completions.create(
        model=model,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=20,
        extra_body={"ignore_eos": True},
    )
    expected = {"tokenize", "route", "prefill_queue", "prefill", "transfer", "decode_queue"}

    def accounted() -> dict[str, Any] | None:
        """The timeline, once both workers have said where their time went."""
        (found,) = system.get(f"/v1/requests/{response.id}/timeline").json()["sequences"]
        return found if expected <= {stage["name"] for stage in found["stages"]} else None

    sequence = wait_until(accounted, 10, f"a timeline with {sorted(expected)}")
    stages = {stage["name"]: stage["seconds"] for stage in sequence["stages"]}
    assert stages["prefill"] > 0 and stages["first_decode"] > 0 and stages["decode"] > 0
    total = sequence["end_to_end_s"]
    assert min(stages.values()) >= 0
    assert abs(sum(stages.values()) - total) <= max(0.001, 0.01 * total)
    assert sequence["unattributed_s"] <= max(0.001, 0.01 * total)


def metric(port: int, name: str) -> float:
    """Sum of a metric's series on a process; 0 without any."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((f"{name} ", f"{name}{{"))
    )


def probes_that_measured(port: int) -> float:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    (value,) = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "diptych_kv_link_probes_total" and sample.labels["outcome"] == "measured"
    ]
    return value


def test_metrics_follow_the_work(client: openai.OpenAI, model: str, system: Cluster) -> None:
    watched = [
        (system.port, "diptych_router_requests_total"),
        (system.port, "diptych_router_time_to_first_token_seconds_count"),
        (system.prefill[0].metrics_port, "diptych_kv_commits_total"),
        (system.decode[0].metrics_port, "diptych_kv_transfer_duration_seconds_count"),
        (system.decode[0].metrics_port, "diptych_step_duration_seconds_count"),
    ]
    before = [metric(*one) for one in watched]
    client.completions.create(model=model, prompt="metrics", max_tokens=4)
    for one, past in zip(watched, before, strict=True):
        wait_until(lambda one=one, past=past: metric(*one) > past, 5, f"{one} to grow")
    for worker in system.workers:
        assert metric(worker.metrics_port, "diptych_cache_config_info") == 1
        assert metric(worker.metrics_port, "diptych_engine_heartbeat_age_seconds") < 5
        assert httpx.get(f"http://127.0.0.1:{worker.metrics_port}/healthz").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{worker.metrics_port}/readyz").status_code == 200


def test_placement_reckons_with_the_measured_link(
    client: openai.OpenAI, model: str, system: Cluster
) -> None:
    client.completions.create(model=model, prompt="link", max_tokens=4)
    port = system.decode[0].metrics_port
    wait_until(
        lambda: probes_that_measured(port),
        10,
        "the link to be measured",
    )
    wait_until(lambda: metric(port, "diptych_kv_link_bytes_per_second"), 5, "the rate")
    rate = metric(port, "diptych_kv_link_bytes_per_second")
    assert 1e6 < rate < 1e12
    assert 1e-7 < metric(port, "diptych_kv_link_latency_seconds") < 0.1

    def measured() -> bool:
        response = client.completions.create(model=model, prompt="link", max_tokens=1)
        (sequence,) = system.get(f"/v1/requests/{response.id}/timeline").json()["sequences"]
        transfer = sequence["attempts"][0]["decision"]["transfer_rate"]
        return bool(transfer["measured"]) and transfer["bytes_per_s"] > 1e6

    wait_until(measured, 5, "a placement by the measured rate")


def test_health_and_ready(system: Cluster) -> None:
    assert system.get("/health").status_code == 200
    assert system.get("/ready").status_code == 200


def test_curl_as_a_newcomer_types_it(system: Cluster, model: str) -> None:
    body = json.dumps({"model": model, "prompt": "Hi", "max_tokens": 3, "stream": True})
    done = subprocess.run(
        [
            "curl",
            "-sN",
            f"{system.url}/v1/completions",
            "-H",
            "Content-Type: application/json",
            "-d",
            body,
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.rstrip().endswith("data: [DONE]")
    with httpx.stream(
        "POST", f"{system.url}/v1/completions", json=json.loads(body), timeout=30
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert list(stream_events(response))
