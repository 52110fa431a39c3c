"""`diptych plan`: what it takes for its numbers, what it refuses, and that both outputs agree."""

import json
from collections.abc import Mapping

import httpx
import pytest

from core.errors import ConfigError, UnavailableError
from diptych.planning.main import main
from diptych.planning.measured import Measured, ask_prometheus, watch_router
from diptych.planning.question import ask
from diptych.planning.settings import PlanSettings

LOAD = ("--rate", "1", "--prompt-tokens", "900", "--output-tokens", "100", "--spread", "0.3")
RATES = ("--prefill-tokens-per-s", "1200", "--decode-step-s", "10ms", "--max-num-seqs", "32")
FLEET = {
    "workers": [
        {"state": "lost", "role": "prefill"},
        {
            "state": "ready", "role": "prefill", "prefill_tokens_per_s": 8000.0,
            "decode_step_s": None, "running": 1, "max_num_seqs": 64,
            "kv": {"num_blocks": 100, "block_size": 16, "block_bytes": 3200},
            "cache_hit": {"prompt_tokens": 1000, "cached_tokens": 250},
        },
        {
            "state": "ready", "role": "decode", "prefill_tokens_per_s": None,
            "decode_step_s": 0.02, "running": 9, "max_num_seqs": 32,
            "kv": {"num_blocks": 1000, "block_size": 16, "block_bytes": 3200},
            "cache_hit": {"prompt_tokens": 500, "cached_tokens": 500},
        },
    ],
    "links": [{"bytes_per_s": 4e9}, {"bytes_per_s": None}],
}  # fmt: skip


def router(request: httpx.Request, scrapes: list[int]) -> httpx.Response:
    if request.url.path == "/v1/fleet":
        return httpx.Response(200, json=FLEET)
    scrapes.append(1)
    count = 10 * len(scrapes)
    return httpx.Response(
        200,
        text="# TYPE diptych_router_generations_total counter\n"
        f'diptych_router_generations_total{{outcome="stop"}} {count}\n'
        f'diptych_router_generations_total{{outcome="length"}} {count}\n'
        "# TYPE diptych_router_prompt_tokens_total counter\n"
        f"diptych_router_prompt_tokens_total {count * 200}\n"
        "# TYPE diptych_router_generation_tokens_total counter\n"
        f"diptych_router_generation_tokens_total {count * 60}\n",
    )


def test_a_watched_router_says_load_and_rates() -> None:
    scrapes: list[int] = []
    waited: list[float] = []
    transport = httpx.MockTransport(lambda request: router(request, scrapes))
    with httpx.Client(base_url="http://r", transport=transport) as client:
        measured = watch_router(client, 5.0, waited.append)
    assert waited == [5.0]
    assert measured == Measured(
        rate=4.0, prompt_tokens=100.0, output_tokens=30.0, hit_ratio=0.25,
        prefill_tokens_per_s=8000.0, decode_step_s=0.02, decode_batch=9.0, max_num_seqs=32,
        kv_tokens=16_000, kv_bytes_per_token=200.0, link_bytes_per_s=4e9,
        prefill_replicas=1, decode_replicas=1,
    )  # fmt: skip
    question = ask(PlanSettings(router="http://r"), measured)
    assert question.rates.decode_step_s(9, 0) == pytest.approx(0.02)
    one, full = question.rates.decode_step_s(1, 0), question.rates.decode_step_s(32, 0)
    assert full == pytest.approx(2 * one), "as the router assumes, for want of a second point"
    assert question.caches.hit_ratio == 0.25


def test_an_idle_system_and_one_that_is_none_are_named() -> None:
    with pytest.raises(ConfigError, match="no load to plan for"):
        ask(PlanSettings(router="http://r"), Measured(prefill_tokens_per_s=1.0))
    for answer in (httpx.Response(500), httpx.Response(200, text="<html>")):
        transport = httpx.MockTransport(lambda _, answer=answer: answer)  # type: ignore[misc]
        with (
            httpx.Client(base_url="http://r", transport=transport) as client,
            pytest.raises(UnavailableError, match="http://r"),
        ):
            ask_prometheus(client, 3600)


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> Mapping[str, object]:
    assert main([*LOAD, *RATES, *options, "--json"]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    answer = planned(capsys)
    assert main([*LOAD, *RATES]) == 0
    text = capsys.readouterr().out
    fleet = answer["plan"]
    assert isinstance(fleet, dict)
    assert f"{fleet['prefill']} prefill + {fleet['decode']} decode" in text
    assert str(answer["bottleneck"]) in text
    assert isinstance(answer["carries"], float)
    assert answer["carries"] >= 1.19, "headroom is part of the plan"
    assert "kv_bytes_per_token = 131072" in text, "what was assumed is said"
    near = answer["sensitivity"]
    assert isinstance(near, list)
    good = {(each["prefill"], each["decode"]): each["good"] for each in near}
    assert good[fleet["prefill"], fleet["decode"]] >= 0.95
    fewer = good.get((fleet["prefill"] - 1, fleet["decode"]))
    assert fewer is None or fewer < 0.95


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--ttft-s", "50ms"), "miss the TTFT"),
        (("--tpot-s", "5ms"), "miss the TPOT"),
        (("--decode-step-full-s", "1ms"), "must not be less"),
    ],
)
def test_what_can_not_be_met_is_said(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], reason: str
) -> None:
    assert main([*LOAD, *RATES, *options]) == 1
    assert reason in capsys.readouterr().err


def test_rates_and_one_load_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(LOAD) == 1
    assert "--prefill-tokens-per-s" in capsys.readouterr().err
    for wrong in ([], ["--rate", "3"], [*LOAD, "--trace", "x"], [*LOAD, "--router", "http://r"]):
        with pytest.raises(SystemExit):
            main([*wrong, *RATES])
        assert "give" in (error := capsys.readouterr().err) or "go together" in error
