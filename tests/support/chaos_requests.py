"""Requests of every kind from a seed, how to send one, and what of its answer must never change."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

WORDS = (
    "the", "keeper", "of", "lighthouse", "wrote", "in", "her", "log", "that", "sea", "was", "calm",
    "and", "no", "ship", "came", "by",
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob"]},
        "days": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 4, "maxItems": 6},
    },
    "required": ["name", "days"],
    "additionalProperties": False,
}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}\nCalls are <tool_call>JSON"
    "</tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTION = {"name": "log", "description": "Write.", "parameters": SCHEMA}
CUT_WORDS = ("created", "id", "model", "usage", "request_id", "system_fingerprint")
LOGPROB_TOLERANCE = 0.01
"""A token computed with its prompt and one computed after it differ in their last bits."""


@dataclass(frozen=True, slots=True)
class ChaosRequest:
    """One request of the list."""

    number: int
    kind: str
    path: str
    body: dict[str, Any]
    leaves_after: int | None = None
    """The client goes away after this many events of the stream."""


@dataclass(slots=True)
class Answer:
    """What a client got, without what differs from one time to the next."""

    status: int
    choices: dict[int, dict[str, Any]]
    error: str = ""
    left: bool = False
    """The client went away before the end."""
    tokens: int | None = None
    """Of the output, as the usage says."""


def make_requests(seed: int, count: int) -> list[ChaosRequest]:
    """The same list for the same seed."""
    source = random.Random(f"requests/{seed}")
    shared = _text(source, 60)
    return [_request(number, source, shared) for number in range(count)]


def _request(number: int, source: random.Random, shared: str) -> ChaosRequest:
    kind = source.choice(KINDS)
    text = _text(source, source.randint(3, 90))
    if source.random() < 0.4:
        text = f"{shared} {text[:40]}"
    body: dict[str, Any] = {"max_tokens": source.randint(12, 60), "stream": source.random() < 0.6}
    if source.random() < 0.5:
        body["temperature"] = 0
    else:
        body |= {"temperature": 0.9, "top_p": 0.95, "seed": source.randrange(10**6)}
        body |= source.choice([{}, {"frequency_penalty": 0.4}, {"top_k": 40, "min_p": 0.01}])
    chat = source.random() < 0.5 if kind not in ("tools", "echo") else kind == "tools"
    leaves_after = None
    match kind:
        case "plain":
            body |= {"ignore_eos": True}
        case "choices":
            body |= {"n": source.choice([2, 3]), "temperature": 0.8, "seed": number}
        case "stop":
            body |= {"stop": [source.choice(["e", "th", "a", "s"])], "max_tokens": 80}
        case "logprobs":
            body |= {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
        case "echo":
            body |= {"echo": True, "logprobs": 2, "stream": False}
        case "grammar":
            body |= source.choice(
                [
                    {"json_schema": SCHEMA, "max_tokens": 120},
                    {"regex": "(yes|no), [a-f]{12,20}[.]"},
                    {"structured_outputs": {"choice": ["to the lighthouse", "to the sea"]}},
                ]
            )
        case "tools":
            body |= {"tools": [{"type": "function", "function": FUNCTION}], "max_tokens": 160}
            body |= {"tool_choice": "required", "parallel_tool_calls": False}
        case "leaves":
            body |= {"stream": True, "ignore_eos": True, "max_tokens": 80}
            leaves_after = source.randint(0, 12)
        case "invalid":
            body |= source.choice(
                [
                    {"json_schema": {"type": "record"}},
                    {"regex": "(unclosed"},
                    {"max_tokens": -1},
                    {"top_p": 2},
                ]
            )
    if chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    body["model"] = "chaos"
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return ChaosRequest(number, kind, path, body, leaves_after)


KINDS = (
    *("plain",) * 4,
    *("choices", "stop", "logprobs", "grammar", "tools", "leaves") * 2,
    *("echo", "invalid"),
)


def _text(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(words))


async def send(client: httpx.AsyncClient, request: ChaosRequest, *, stay: bool) -> Answer:
    """Send it and take all of the answer, or leave early if that is its kind and not `stay`."""
    headers = {"x-request-id": f"chaos-{request.number}"}
    if not request.body["stream"]:
        response = await client.post(request.path, json=request.body, headers=headers)
        return _whole(response.status_code, response.json())
    async with client.stream("POST", request.path, json=request.body, headers=headers) as response:
        if response.status_code != 200:
            return _whole(response.status_code, json.loads(await response.aread()))
        answer, seen, ended = Answer(200, {}), 0, False
        async for line in _lines(response):
            if seen == request.leaves_after and not stay:
                answer.left = True
                return answer
            if line == b"data: [DONE]":
                ended = True
            elif line.startswith(b"data: "):
                _add(answer, json.loads(line.removeprefix(b"data: ")))
                seen += 1
        if not ended and not answer.error:
            answer.error = "the stream ended without [DONE]"
        return answer


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """As server-sent events part them; httpx would part at U+0085 and U+2028 as well."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def _whole(status: int, body: dict[str, Any]) -> Answer:
    answer = Answer(status, {})
    if status != 200:
        answer.error = f"{body['error'].get('code')}: {body['error']['message']}"
        return answer
    for choice in body["choices"]:
        answer.choices[choice["index"]] = _without(choice)
    answer.tokens = body["usage"]["completion_tokens"]
    return answer


def _without(value: Any) -> Any:
    """The value without ids that are drawn anew each time."""
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in CUT_WORDS}
    return [_without(each) for each in value] if isinstance(value, list) else value


def _add(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        assert not answer.error, f"a request ends once: {answer.error}; {event['error']}"
        answer.error = f"{event['error'].get('code')}: {event['error']['message']}"
        return
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        index = choice["index"]
        answer.choices[index] = _joined(answer.choices.get(index), _without(choice))


def _joined(before: Any, after: Any) -> Any:
    """Two parts of a stream as one: texts and lists in a row, of other values the latest."""
    if before is None or after is None:
        return after if before is None else before
    if isinstance(before, dict) and isinstance(after, dict):
        return {key: _joined(before.get(key), after.get(key)) for key in {**before, **after}}
    if isinstance(before, list) and isinstance(after, list):
        return _joined_lists(before, after)
    fixed = isinstance(before, bool) or not isinstance(before, str)
    return after if fixed or before == after in ("assistant", "function") else before + after


def _joined_lists(before: list[Any], after: list[Any]) -> list[Any]:
    if not all(isinstance(each, dict) and "index" in each for each in (*before, *after)):
        return before + after
    by_index = {each["index"]: each for each in before}
    for each in after:
        known = by_index.get(each["index"])
        merged = _joined(known, each)
        by_index[each["index"]] = merged | {"index": each["index"]}
    return list(by_index.values())


def difference(expected: Answer, got: Answer) -> str:
    """What changed; empty if nothing did."""
    if got.left:
        return _fault_of_a_part(expected, got)
    if expected.error and got.error == expected.error:
        return ""  # with a status of its own, or, if it took long to find out, within a stream
    if (got.status, got.error) != (expected.status, expected.error):
        before = f"{expected.status}, {expected.error!r}"
        return f"status {got.status}, error {got.error!r}; before {before}"
    if got.tokens != expected.tokens:
        return f"{got.tokens} tokens, before {expected.tokens}"
    return next(_differences(expected.choices, got.choices, "choices"), "")


def _fault_of_a_part(expected: Answer, got: Answer) -> str:
    """How far a client came that went away differs from one time to the next; what it got not."""
    for index, choice in got.choices.items():
        whole, part = _said(expected.choices[index]), _said(choice)
        if not whole.startswith(part):
            return f"choices.{index}: {part!r}, before {whole!r}"
    return got.error


def _said(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


def _differences(expected: Any, got: Any, where: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        for key in expected:
            yield from _differences(expected[key], got[key], f"{where}.{key}")
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for number, pair in enumerate(zip(expected, got, strict=True)):
            yield from _differences(*pair, f"{where}[{number}]")
    elif isinstance(expected, float) and isinstance(got, float):
        if abs(expected - got) > LOGPROB_TOLERANCE:
            yield f"{where}: {got!r}, before {expected!r}"
    elif expected != got:
        yield f"{where}: {got!r}, before {expected!r}"


async def answer_within(
    client: httpx.AsyncClient, request: ChaosRequest, limit_s: float, *, stay: bool = False
) -> Answer:
    """Its answer; an error says that there was none in time, or that the connection broke."""
    try:
        async with asyncio.timeout(limit_s):
            return await send(client, request, stay=stay)
    except TimeoutError:
        return Answer(0, {}, error=f"no end within {limit_s:g} s")
    except httpx.HTTPError as error:
        return Answer(0, {}, error=f"{type(error).__name__}: {error}")
