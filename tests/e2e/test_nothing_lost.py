"""Every kind of request at once while workers are killed, frozen or told to end: no answer changes.

One system of real processes. Each test sends all kinds together to chosen workers, disturbs those
when every stream has begun, and compares what clients got with the undisturbed answers.
"""

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_front_door import PARAMETERS, TEMPLATE, TOOLS
from tests.support.answers import answer_of, differences
from tests.support.cluster import QUICK_START, Cluster, Worker, cluster, routed
from tests.support.models import make_checkpoint
from tests.support.process import wait_until

PROMPT = "The keeper of the lighthouse wrote in her log: " * 3
MOST = 7
"""So many kinds must be under way when they are disturbed; the others ended too soon."""
LONG = 240
"""Tokens of an answer that nothing else ends."""
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 5}
NAMED = {"type": "function", "function": {"name": "weather"}}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
SCHEMA = {
    "type": "object",
    "properties": {
        "days": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 9, "maxItems": 12},
    },
    "required": ["days"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
Kind = tuple[str, dict[str, Any]]
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
KINDS: dict[str, Kind] = {
    "greedy": (TEXT, {"temperature": 0}),
    "seeded": (TEXT, {**SAMPLED, "top_k": 50, "min_p": 0.01}),
    "n": (TEXT, {**SAMPLED, "n": 3}),
    "logprobs": (TEXT, {"temperature": 0, "logprobs": 3}),
    "steered": (
        TEXT,
        {
            **SAMPLED,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.6,
            "repetition_penalty": 1.2,
            "logit_bias": {"70": 4.0},
        },
    ),
    "min_tokens": (TEXT, {**SAMPLED, "logit_bias": {"2": 9.0}, "min_tokens": 30}),
    "chat": (CHAT, {**SAMPLED, "logprobs": True, "top_logprobs": 2}),
    "tools": (CHAT, {**SAMPLED, "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 200}),
    "structured": (CHAT, {**SAMPLED, "response_format": FORM, "max_tokens": 400}),
    "reasoning": (CHAT, {"temperature": 0, "chat_template_kwargs": {"think": True}}),
    "responses": (
        "/v1/responses",
        {
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "name": "weather"},
            "temperature": 0,
        },
    ),
    "one token": (CHAT, {**SAMPLED, "response_format": FORM, "max_tokens": 1}),
    "native": ("/generate", {}),
    "echo": (TEXT, {"echo": True, "logprobs": 1, "temperature": 0, "stream": False}),
}
"""Path and fields; all are streamed unless they say otherwise."""


def body_of(kind: str, model: str) -> dict[str, Any]:
    path, fields = KINDS[kind]
    prompt = f"{kind}: {PROMPT}"  # of its own, so that none finds another's blocks cached
    body: dict[str, Any] = {"model": model, "stream": True, **fields}
    if path == "/generate":
        params = {"temperature": 0.9, "sampling_seed": 3, "max_new_tokens": LONG}
        return {"text": prompt, "stream": True, "sampling_params": {**params, "ignore_eos": True}}
    if path == "/v1/responses":
        return {**body, "input": prompt, "max_output_tokens": 200}
    body = {"max_tokens": LONG, "ignore_eos": "max_tokens" not in fields, **body}
    if kind == "min_tokens":
        body["ignore_eos"] = False
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if path == TEXT:
        return {**body, "prompt": prompt}
    return {**body, "messages": [{"role": "user", "content": prompt}]}


@dataclass
class Crowd:
    """All kinds under way, each in a thread of its own."""

    system: Cluster
    bodies: dict[str, dict[str, Any]]
    got: dict[str, str] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    ends: dict[str, Future[None]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, kind: str) -> None:
        url = self.system.url + KINDS[kind][0]
        with httpx.stream(
            "POST", url, json=self.bodies[kind], timeout=90, verify=False
        ) as response:
            self.modes[kind] = response.headers.get("x-diptych-mode", "")
            for piece in response.iter_text():
                with self._lock:
                    self.got[kind] = self.got.get(kind, "") + piece
            assert response.status_code == 200, self.got

    def streaming(self) -> bool:
        """True once most streams brought something after their heads."""
        for end in self.ends.values():
            assert not end.done() or end.result() is None
        return sum(got.count("data: ") >= 2 for got in list(self.got.values())) >= MOST

    @property
    def open(self) -> int:
        """Answers that have not ended."""
        return sum(not end.done() for end in self.ends.values())

    def check(self, calm: dict[str, Any]) -> None:
        """Wait for all; they are what they are when nobody disturbs them."""
        # Log probabilities may differ by rounding, since they are computed in other batches; and
        # an attempt that brought no token may have left blocks that the next one found.
        found = differences(calm, self.answers(), 2e-3)
        assert not [each for each in found if ".cached_tokens: " not in each]

    def answers(self) -> dict[str, Any]:
        """Wait for all."""
        for kind, end in self.ends.items():
            assert end.exception(60) is None, f"{kind}: {end.exception()}\n{self.system.log}"
        return {kind: answer_of(self.got[kind]) for kind in self.bodies}


@contextmanager
def crowd(system: Cluster) -> Iterator[Crowd]:
    model = system.get("/v1/models").json()["data"][0]["id"]
    with ThreadPoolExecutor(len(KINDS)) as pool:
        one = Crowd(system, {kind: body_of(kind, model) for kind in KINDS})
        one.ends = {kind: pool.submit(one.read, kind) for kind in KINDS}
        yield one


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("kinds"),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        max_position_embeddings=8192,
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with cluster(
        folder,
        prefill=2,
        decode=2,
        worker={**QUICK_START, "max_step_tokens": 64, "stall_after_s": "3s"},
        prefill_worker={"lease_ttl_s": "4s"},
        # Without the delay no lease lasts long enough to be seen from outside.
        decode_worker=[
            {"drain_timeout_s": drain, "faults": "kv.read:delay=200ms"} for drain in ("30s", "0s")
        ],
        router={
            "worker_silence_s": "2s",
            "no_worker_grace_s": "5s",
            # Workers are taken again at once: one test's blows are no word on the next one's.
            "breaker_open_s": "10ms",
            "breaker_open_max_s": "10ms",
        },
    ) as running:
        yield running


@pytest.fixture(scope="module")
def calm(system: Cluster) -> dict[str, Any]:
    """What nobody disturbed."""
    with crowd(system) as undisturbed:
        answers = undisturbed.answers()
    assert undisturbed.modes["echo"] == "disaggregated"
    assert not retries(system), f"{retry_codes(system)}\n{system.log}"
    system.wait_balanced()
    return answers


def retry_codes(system: Cluster) -> dict[str, float]:
    """Attempts that failed, by cause."""
    found = re.findall(
        r'^diptych_router_retries_total\{reason="(\w+)"\} (\S+)$', system.get("/metrics").text, re.M
    )
    return {code: float(count) for code, count in found}


def retries(system: Cluster) -> float:
    return sum(retry_codes(system).values())


@pytest.fixture
def whole(system: Cluster, calm: dict[str, Any]) -> Cluster:
    """Every worker runs and takes requests, with nothing in its caches."""
    for worker in system.workers:
        if worker.process is None or not worker.process.running:
            worker.kill()
            worker.start()
    system.wait_ready(60)
    for worker in system.workers:
        worker.flush_cache()
    return system


@contextmanager
def all_on(
    system: Cluster, chosen: Worker, reached: Callable[[Crowd], object], calm: dict[str, Any]
) -> Iterator[None]:
    """All kinds, each of them on one worker of a role, when a stage is reached there.

    After the block the other worker of that role takes requests too, those that lost theirs first.
    """
    (other,) = (w for w in system.workers if w.role == chosen.role and w is not chosen)
    other.drain()
    try:
        wait_until(lambda: system.num_attached(chosen.role) == 1, 10, "the other to be left out")
        with crowd(system) as everyone:
            wait_until(lambda: reached(everyone), 20, "the stage", lambda: system.log)
            assert everyone.open >= MOST, f"only {everyone.open} are left to be disturbed"
            yield
            other.drain(resume=True)
            everyone.check(calm)
    finally:
        other.drain(resume=True)


def has_prompts(worker: Worker) -> Callable[[Crowd], bool]:
    return lambda _: worker.describe().load.leases >= 3


def test_decode_frozen_under_every_kind(whole: Cluster, calm: dict[str, Any]) -> None:
    victim = whole.decode[1]
    with ExitStack() as until_all_have_ended, all_on(whole, victim, Crowd.streaming, calm):
        until_all_have_ended.enter_context(victim.frozen())
    whole.wait_balanced(20)


def test_decode_killed_under_every_kind(whole: Cluster, calm: dict[str, Any]) -> None:
    victim, before = whole.decode[0], retries(whole)
    with all_on(whole, victim, Crowd.streaming, calm):
        victim.kill()
    assert retries(whole) - before >= MOST
    whole.wait_balanced()


def test_both_sides_killed_during_the_hand_overs(whole: Cluster, calm: dict[str, Any]) -> None:
    """Prompts in every state: waiting, half computed, half read, and some that generate."""
    victim = whole.prefill[0]
    with all_on(whole, victim, has_prompts(victim), calm):
        victim.kill()
        whole.decode[0].kill()
    whole.wait_balanced(20)


def test_workers_told_to_end_finish_what_they_have(whole: Cluster, calm: dict[str, Any]) -> None:
    """Prefill does not leave before its leases were read, nor decode before its last token."""
    prefill, decode, before = whole.prefill[1], whole.decode[0], retry_codes(whole)
    assert prefill.process is not None and decode.process is not None
    with all_on(whole, prefill, has_prompts(prefill), calm):
        prefill.process.signal(signal.SIGTERM)
        decode.process.signal(signal.SIGTERM)
        assert prefill.process.wait(20) == decode.process.wait(20) == 0
    prefill.kill()
    decode.kill()
    # Only what was on its way there when it began to drain had to go elsewhere.
    codes = {code for code, count in retry_codes(whole).items() if count > before.get(code, 0)}
    assert codes <= {"unavailable", "worker_lost"}, whole.log
    whole.wait_balanced()


def test_worker_with_no_time_to_finish_hands_its_requests_back(
    whole: Cluster, calm: dict[str, Any]
) -> None:
    victim, before = whole.decode[1], retries(whole)
    assert victim.process is not None
    with all_on(whole, victim, Crowd.streaming, calm):
        victim.process.signal(signal.SIGTERM)
        assert victim.process.wait(20) == 0
        assert "handing them back" in victim.process.log
    victim.kill()
    assert retries(whole) - before >= MOST // 2
    whole.wait_balanced()


def test_lost_router_frees_everything_and_the_next_one_knows_what_is_cached(
    whole: Cluster, calm: dict[str, Any]
) -> None:
    command = whole.router.popen.args
    assert isinstance(command, list)
    folder = Path(command[command.index("--model") + 1])
    # A router of its own: the other tests need theirs, and they may run in any order.
    with routed(folder, prefill=whole.prefill, decode=whole.decode) as lost, crowd(lost) as cut:
        wait_until(cut.streaming, 30, "most streams")
        open_ends = [end for end in cut.ends.values() if not end.done()]
        lost.router.kill_group()
        assert lost.wait_balanced() < 1.0
        errors = [error for end in open_ends if (error := end.exception(10)) is not None]
        assert len(errors) >= MOST, "one may have ended well just before"
        for error in errors:
            assert isinstance(error, httpx.TransportError), "one broken connection"
    with routed(folder, prefill=whole.prefill, decode=whole.decode) as again:
        answer = again.openai().completions.create(
            model=folder.name,
            prompt=f"greedy: {PROMPT}",
            max_tokens=LONG,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.choices[0].text == calm["greedy"]["choices"]["0"]["text"]
        assert answer.usage and answer.usage.prompt_tokens_details
        assert answer.usage.prompt_tokens_details.cached_tokens
        (attempt,) = again.get(f"/v1/requests/{answer.id}/timeline").json()["sequences"][0][
            "attempts"
        ]
        assert attempt["decision"]["predicted_cached_tokens"], "known without having sent it there"
        again.wait_balanced()
