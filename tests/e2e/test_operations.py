"""What operators ask of a whole system: signals for scaling, a plan from its load, a check-up."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from diptych.autoscale.signals import read_router
from diptych.doctor.main import main as doctor
from diptych.planning.main import main as plan
from tests.support.cluster import TOKEN, Cluster, cluster
from tests.support.process import wait_until


@pytest.fixture(scope="module")
def system(plain: Cluster) -> Iterator[Cluster]:
    yield plain
    plain.wait_balanced()


@contextmanager
def load(system: Cluster) -> Iterator[None]:
    """Completions one after the other, for the length of the block."""
    stop = threading.Event()

    def ask() -> None:
        with system.openai() as client:
            model, count = client.models.list().data[0].id, 0
            while not stop.is_set():
                count += 1
                prompt = f"{count} " + "tell me of the sea " * 40
                client.completions.create(
                    model=model, prompt=prompt, max_tokens=16, extra_body={"ignore_eos": True}
                )

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_signals_and_a_plan_come_from_a_running_system(
    system: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    def signals_are_there() -> bool:
        reading = read_router(system.get("/metrics").text, 0.0)
        return reading.prefill_tokens_per_s > 0 and reading.gaps[float("inf")] > 0

    with load(system):
        wait_until(signals_are_there, 20, "what autoscalers read")
        assert read_router(system.get("/metrics").text, 0.0).ready == {"prefill": 1, "decode": 1}
        options = ("--watch-s", "2", "--ttft-s", "30", "--tpot-s", "2", "--json")
        assert plan(["--router", system.url, *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["load"]["rate"] > 0
    assert 15 <= answer["load"]["output_tokens"] <= 17
    assert answer["plan"]["prefill"] >= 1
    worker = httpx.get(f"http://127.0.0.1:{system.decode[0].metrics_port}/metrics", timeout=5).text
    for name in ("diptych_batch_usage_ratio", "diptych_prefill_backlog_seconds"):
        assert f"# TYPE {name} gauge" in worker


def test_the_doctor_finds_a_sound_system_sound_and_names_a_wrong_token(
    system: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *("--role", "elsewhere", "--router", system.url),
        *("--prefill", system.prefill[0].address, "--decode", system.decode[0].address),
        *("--metrics-port", str(system.decode[0].metrics_port)),
    ]
    assert doctor([*options, "--auth-token", TOKEN]) == 0
    assert "1 prefill, 1 decode" in (said := capsys.readouterr().out), said
    assert doctor([*options, "--auth-token", "wrong", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert {each["check"].rpartition(" ")[2] for each in findings if each["level"] == "fail"} == {
        "token"
    }


def test_pools_between_which_no_kv_moves_right_are_told_of_and_one_serves_alone(
    system: Cluster, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Met elsewhere: requests ran on decode alone for days: no KV ever moved, and nothing said so.
    def ask(asked: Cluster) -> tuple[str, str]:
        with asked.openai() as client:
            model = client.models.list().data[0].id
            answer = client.completions.with_raw_response.create(
                model=model, prompt="tell me of the sea " * 40, max_tokens=8, temperature=0
            )
        return answer.parse().choices[0].text, answer.headers["x-diptych-mode"]

    right, mode = ask(system)
    assert mode == "disaggregated"
    with cluster(tiny_llama, decode_worker={"faults": "kv.stamp:corrupt"}) as deaf:
        assert ask(deaf) == (right, "decode_only")
        links = lambda: deaf.get("/v1/fleet").json()["links"]  # noqa: E731
        wait_until(lambda: links()[0]["failure"], 20, "decode's next report")
        (link,) = links()
        assert "other bytes than were sent" in link["failure"]
        options = ["--role", "elsewhere", "--router", deaf.url, "--metrics-port", "0", "--json"]
        assert doctor(options) == 1
        findings = json.loads(capsys.readouterr().out)
        bad = {each["check"] for each in findings if each["level"] == "fail"}
        assert bad == {f"link {link['prefill']} to {link['decode']}", "hand-overs"}
        deaf.wait_balanced()
