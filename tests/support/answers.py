"""What a client has in its hands at the end of an answer, streamed or not, without what may differ.

Two answers are the same if these are: text, calls, reasoning, log probabilities, finish reasons,
usage. Ids and times differ from answer to answer; how a stream was cut into events may differ too.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Body = Mapping[str, Any]

_OF_THE_MOMENT = frozenset(
    {
        *("id", "item_id", "call_id", "response_id", "created", "created_at", "completed_at"),
        *("sequence_number", "e2e_latency", "queue_time", "timing", "service_tier"),
    }
)
_TOLD_ONCE = frozenset({"role", "finish_reason", "object", "model", "type", "name"})
"""Strings that a later event replaces instead of going on with them."""


def answer_of(text: str) -> Any:
    """Put an answer's body together.

    Args:
        text: JSON, or server-sent events.
    """
    if not text.startswith(("data:", "event:")):
        return _lasting(json.loads(text))
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    ended = "[DONE]" in lines
    if any("type" in event for event in events):
        return _of_responses(events)
    if all("choices" in event for event in events):
        return {"ended": ended, **_of_choices(events)}
    return {"ended": ended, "last": _lasting(events[-1])}


def differences(one: Any, other: Any, tolerance: float, at: str = "") -> Iterator[str]:
    """Where two answers are not equal; floats may be apart by `tolerance`."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), tolerance, f"{at}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, tolerance, f"{at}[{index}]")
    elif isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, abs_tol=tolerance):
            yield f"{at}: {one} and {other}"
    elif one != other:
        yield f"{at}: {one!r} and {other!r}"


def _of_choices(events: Iterable[Body]) -> dict[str, Any]:
    choices: dict[str, Any] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            _merge(choices.setdefault(str(choice["index"]), {}), _lasting(choice))
    return {"choices": choices, "usage": usage}


def _of_responses(events: Iterable[Body]) -> dict[str, Any]:
    """The deltas by kind, and the whole that the last event carries; both must be right."""
    deltas: dict[str, str] = {}
    last: Body = {}
    for event in events:
        if isinstance(event.get("delta"), str):
            deltas[event["type"]] = deltas.get(event["type"], "") + event["delta"]
        last = event
    return {"deltas": deltas, "last": _lasting(last)}


def _merge(whole: dict[str, Any], part: Body) -> None:
    for key, value in part.items():
        before = whole.get(key)
        if value is None:
            whole.setdefault(key, None)
        elif key == "tool_calls":
            calls = whole[key] = before or {}
            for call in value:
                _merge(calls.setdefault(str(call["index"]), {}), call)
        elif isinstance(value, dict):
            whole[key] = before or {}
            _merge(whole[key], value)
        elif before is not None and _goes_on(key, value):
            whole[key] = before + value
        else:
            whole[key] = value


def _goes_on(key: str, value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and key not in _TOLD_ONCE)


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if key not in _OF_THE_MOMENT}
    if isinstance(value, list):
        return [_lasting(each) for each in value]
    return value
