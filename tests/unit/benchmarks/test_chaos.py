"""The parts of a chaos run: the same seed repeats it, and what goes wrong is noticed."""

import json

import httpx
import pytest

from telemetry.faults import parse_faults
from tests.support.chaos import unforeseen
from tests.support.chaos_plan import ChaosPlan
from tests.support.chaos_requests import Answer, ChaosRequest, difference, make_requests, send
from tests.support.chaos_schedule import RETURN_S, Blow

STREAMED = ChaosRequest(1, "plain", "/v1/chat/completions", {"stream": True}, leaves_after=2)


def test_a_seed_repeats_requests_and_blows() -> None:
    assert make_requests(5, 60) == make_requests(5, 60) != make_requests(6, 60)
    assert len({request.kind for request in make_requests(5, 200)}) == 9
    plan = ChaosPlan(seed=5)
    assert plan.schedule == ChaosPlan(seed=5).schedule != ChaosPlan(seed=6).schedule
    assert plan.worker_settings == ChaosPlan(seed=6).worker_settings
    varied = ChaosPlan(seed=5, vary=True)
    assert varied.router_settings == ChaosPlan(seed=5, vary=True).router_settings


@pytest.mark.parametrize("seed", range(20))
def test_somebody_of_each_role_is_left_in_peace(seed: int) -> None:
    schedule = ChaosPlan(seed=seed, duration_s=200.0).schedule
    assert len(schedule) > 40
    for blow in schedule:
        parse_faults(blow.faults)
        for role in (range(3), range(3, 6)):
            hurt = {
                other.worker
                for other in schedule
                if other.worker in role
                and other.at_s <= blow.at_s
                and blow.at_s
                < other.at_s + other.for_s + RETURN_S * (other.kind in ("kill", "drain"))
            }
            assert len(hurt) < 3


def lasts_s(blow: Blow) -> float:
    return blow.for_s + (RETURN_S if blow.kind in ("kill", "drain") else 0.0)


async def answer(*events: object, stay: bool = True) -> Answer:
    lines = [json.dumps(event, ensure_ascii=False) for event in events]
    body = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])

    def respond(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=body.encode())

    transport = httpx.MockTransport(respond)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await send(client, STREAMED, stay=stay)


def said(text: str, **more: object) -> dict[str, object]:
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, **more}]}


async def test_a_stream_is_joined_and_any_change_is_noticed() -> None:
    whole = await answer(said("one\u2028"), said("two"), said("", finish_reason="stop"))
    assert whole.choices[0]["delta"]["content"] == "one\u2028two"
    again = await answer(said("one\u2028two"), said("", finish_reason="stop"))
    assert difference(whole, again) == ""
    for other in (
        await answer(said("one\u2028two"), said("!", finish_reason="stop")),
        await answer(said("one\u2028two"), said("", finish_reason="length")),
        await answer(said("one\u2028two"), {"error": {"code": "internal", "message": "no"}}),
    ):
        assert difference(whole, other)


async def test_a_client_that_left_must_have_got_a_beginning() -> None:
    whole = await answer(said("one"), said("two"), said("three", finish_reason="stop"))
    left = await answer(said("one"), said("two"), said("three"), stay=False)
    assert left.left and left.choices[0]["delta"]["content"] == "onetwo"
    assert difference(whole, left) == ""
    assert difference(whole, await answer(said("one"), said("TWO"), said("x"), stay=False))


def test_a_traceback_that_nobody_asked_for_is_a_failure() -> None:
    raised = "Traceback (most recent call last):\n  File x\n    raise\n{}\nmore\n"
    log = raised.format("telemetry.InjectedFaultError: injected fault engine.step:raise")
    assert unforeseen(log) == []
    (found,) = unforeseen(log + raised.format("KeyError: 'r'"))
    assert "KeyError" in found
