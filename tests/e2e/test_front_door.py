"""Tools, reasoning, responses and the native API, through the whole system."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.support.cluster import Cluster, cluster, stream_events
from tests.support.models import make_checkpoint
from tests.support.process import wait_until

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}\nCalls are <tool_call>JSON"
    "</tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if think %}<think>\n{% endif %}"
    "{# a model that thinks: </think> #}"
)
CITIES = ["Rome", "Oslo"]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": CITIES}},
}
FUNCTION = {"name": "weather", "description": "Forecast.", "parameters": PARAMETERS}
TOOLS: Any = [
    {"type": "function", "function": FUNCTION},
    {"type": "function", "function": {"name": "time"}},
]
MESSAGES: Any = [{"role": "user", "content": "What will the weather be in Rome? " * 4}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tools"), max_position_embeddings=8192)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with cluster(folder, prefill=2) as running:
        yield running
        running.wait_balanced()


def check_arguments(text: str) -> None:
    arguments = json.loads(text)
    assert list(arguments) == ["city", "days"]
    assert arguments["city"] in CITIES and arguments["days"] in (1, 2, 3)


@pytest.mark.parametrize("choice", ["named", "required"])
def test_forced_calls_fit_their_schema_streamed_and_not(
    client: openai.OpenAI, model: str, choice: str
) -> None:
    options: dict[str, Any] = {
        "model": model,
        "messages": MESSAGES,
        "tools": TOOLS if choice == "named" else TOOLS[:1],
        "tool_choice": NAMED if choice == "named" else "required",
        "parallel_tool_calls": False,
        "n": 2,
        "seed": 3,
        "max_tokens": 300,
    }
    raw = client.chat.completions.with_raw_response.create(**options)
    assert raw.headers["x-diptych-mode"] == "disaggregated"
    whole = raw.parse()
    streamed = {0: "", 1: ""}
    for event in client.chat.completions.create(stream=True, **options):
        for one in event.choices:
            for delta in one.delta.tool_calls or []:
                assert delta.function is not None and delta.index == 0
                streamed[one.index] += delta.function.arguments or ""
    for answer in whole.choices:
        (call,) = answer.message.tool_calls or []
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert call.type == "function" and call.function.name == "weather"
        check_arguments(call.function.arguments)
        assert streamed[answer.index] == call.function.arguments


def test_calls_or_an_answer_of_a_form(client: openai.OpenAI, model: str) -> None:
    """What a random model says is one or the other, and nothing else."""
    schema = {"type": "object", "properties": {"sun": {"type": "boolean"}}, "required": ["sun"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        tools=TOOLS[:1],
        response_format=form,
        n=6,
        seed=1,
        temperature=3.0,
        parallel_tool_calls=False,
        max_tokens=300,
    )
    reasons = set()
    for choice in answer.choices:
        reasons.add(choice.finish_reason)
        if choice.finish_reason == "tool_calls":
            assert choice.message.content is None and choice.message.tool_calls
            (call,) = choice.message.tool_calls
            assert call.type == "function"
            check_arguments(call.function.arguments)
        elif choice.finish_reason == "stop":
            assert json.loads(choice.message.content or "")["sun"] in (True, False)
    assert "tool_calls" in reasons


def test_a_conversation_with_calls_goes_on(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "tools": TOOLS, "max_tokens": 300}
    first = client.chat.completions.create(messages=MESSAGES, tool_choice=NAMED, **options)
    message = first.choices[0].message
    assert message.tool_calls
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    history: Any = [*MESSAGES, message.model_dump(exclude_none=True), answer]
    second = client.chat.completions.create(
        messages=history, tool_choice="none", **{**options, "max_tokens": 4}
    )
    assert second.choices[0].message.tool_calls is None
    assert second.choices[0].finish_reason == "length"


def test_reasoning_comes_apart(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {
        "model": model,
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": {"chat_template_kwargs": {"think": True}, "ignore_eos": True},
    }
    whole = client.chat.completions.create(**options)
    message: Any = whole.choices[0].message
    assert message.content == "" and message.reasoning_content
    assert whole.usage and whole.usage.completion_tokens_details
    assert whole.usage.completion_tokens_details.reasoning_tokens == 12
    deltas: list[Any] = [
        e.choices[0].delta for e in client.chat.completions.create(stream=True, **options)
    ]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == message.reasoning_content


def test_responses_streamed_stored_and_with_calls(client: openai.OpenAI, model: str) -> None:
    tool: Any = {"type": "function", "strict": True, **FUNCTION}
    stream = client.responses.create(
        model=model, input="Hello.", max_output_tokens=8, temperature=0, stream=True
    )
    events: list[Any] = list(stream)
    first = events[-1].response
    assert events[0].type == "response.created"
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == first.output_text
    again = client.responses.create(model=model, input="Hello.", max_output_tokens=8, temperature=0)
    assert again.output_text == text
    second = client.responses.create(
        model=model,
        input="And the weather?",
        previous_response_id=first.id,
        tools=[tool],
        tool_choice={"type": "function", "name": "weather"},
        max_output_tokens=300,
    )
    (call,) = second.output
    assert call.type == "function_call" and second.status == "completed"
    check_arguments(call.arguments)
    assert second.usage and first.usage
    assert second.usage.input_tokens > first.usage.total_tokens
    assert client.responses.retrieve(second.id) == second


def test_choices_share_one_prefill(client: openai.OpenAI, model: str, system: Cluster) -> None:
    """Whichever of two prefill workers computes it, the prompt is computed once."""
    httpx.post(f"{system.url}/flush_cache", timeout=30).raise_for_status()
    prompt = list(range(70, 326)) * 4
    answer = client.completions.create(model=model, prompt=prompt, n=4, max_tokens=4)
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    sequences = system.get(f"/v1/requests/{answer.id}/timeline").json()["sequences"]
    spared = sorted(sequence["cached_tokens"] for sequence in sequences)
    # The last block is computed for each: its last token gives the first logits.
    assert spared == [0, *[len(prompt) - 16] * 3]
    assert len({sequence["attempts"][0]["workers"]["prefill"] for sequence in sequences}) == 1


def test_generate_in_its_forms(system: Cluster) -> None:
    def post(**body: Any) -> Any:
        response = httpx.post(f"{system.url}/generate", json=body, timeout=30)
        assert response.status_code == 200, response.text
        return response.json()

    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    one = post(text="The sea", sampling_params=sampling)
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    ids = httpx.post(f"{system.url}/tokenize", json={"prompt": "The sea"}).json()["tokens"]
    batch = post(input_ids=[ids, ids[:2]], sampling_params=sampling, return_logprob=True)
    assert batch[0]["output_ids"] == one["output_ids"] and len(batch) == 2
    assert len(batch[1]["meta_info"]["output_token_logprobs"]) == 6
    body = {"text": "The sea", "sampling_params": sampling, "stream": True}
    with httpx.stream("POST", f"{system.url}/generate", json=body, timeout=30) as response:
        last = list(stream_events(response))[-1]
    assert last["text"] == one["text"]


def test_abort_stops_the_workers(system: Cluster) -> None:
    body = {
        "text": "The sea",
        "rid": "long",
        "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True},
    }
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{system.url}/generate", json=body, timeout=60)
        wait_until(
            lambda: any(worker.describe().load.running for worker in system.decode), 20, "work"
        )
        aborted = httpx.post(f"{system.url}/abort_request", json={"rid": "long"}).json()
        assert aborted == {"success": True, "aborted": 1}
        meta = running.result(20).json()["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and 0 < meta["completion_tokens"] < 4000
    system.wait_balanced()


def test_flush_reaches_every_worker(client: openai.OpenAI, model: str, system: Cluster) -> None:
    client.completions.create(model=model, prompt="flush " * 40, max_tokens=1)
    system.wait_balanced()
    flushed = httpx.post(f"{system.url}/flush_cache").json()
    assert flushed["success"] and len(flushed["workers"]) == 3
    assert sum(worker["freed_blocks"] for worker in flushed["workers"]) > 0
    for worker in system.workers:
        assert worker.describe().load.cached_blocks == 0 or wait_until(
            lambda worker=worker: worker.describe().load.cached_blocks == 0, 5, "the report"
        )


def test_what_runs_here(system: Cluster) -> None:
    server = system.get("/get_server_info").json()
    assert [worker["state"] for worker in server["workers"]] == ["ready"] * 3
    assert "auth_token" not in server["router"]
    info = system.get("/get_model_info").json()
    assert info["tool_parser"] == "hermes" and info["reasoning"] is True
