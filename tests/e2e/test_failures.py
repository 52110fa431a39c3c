"""Workers that die or freeze mid-work: the answer comes out unchanged, or one clear error does."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cluster import Cluster, Worker, cluster, stream_events
from tests.support.oracle import Oracle
from tests.support.process import alive, frozen, http_status, wait_until

PROMPT = "The keeper of the lighthouse wrote in her log: " * 20
MAX_TOKENS = 40
WORKER = {"max_step_tokens": 64, "stall_after_s": "3s"}
ROUTER = {"worker_silence_s": "2s", "no_worker_grace_s": "2s", "request_timeout_s": "60s"}


@pytest.fixture(scope="module")
def expected(slow_llama: Path) -> list[int]:
    oracle = Oracle(slow_llama)
    ids = oracle.tokenizer(PROMPT)["input_ids"]
    assert len(ids) > 600
    return oracle.greedy(ids, MAX_TOKENS, ignore_eos=True)


class Stream(threading.Thread):
    """A streaming request in the background, and what has come of it."""

    def __init__(self, system: Cluster, **body: Any) -> None:
        super().__init__(daemon=True)
        self._system = system
        self._body = body
        self.ids: list[int] = []
        self.finish: str | None = None
        self.error: dict[str, Any] | None = None
        self.start()

    def run(self) -> None:
        model = self._system.get("/v1/models").json()["data"][0]["id"]
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            **self._body,
        }
        url = f"{self._system.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=90) as response:
            if response.status_code != 200:
                response.read()
                self.error = response.json()["error"]
                return
            for event in stream_events(response):
                if "error" in event:
                    assert self.error is None, "a request ends once"
                    self.error = event["error"]
                    continue
                choice = event["choices"][0]
                self.ids += choice.get("token_ids") or []
                self.finish = choice["finish_reason"] or self.finish

    def wait(self, timeout_s: float = 60.0) -> None:
        self.join(timeout_s)
        assert not self.is_alive(), f"no end after {timeout_s} s; log:\n{self._system.log}"


def busy(workers: list[Worker], holds: Callable[[Any], bool]) -> Worker:
    """The worker whose load report satisfies `holds`, as soon as one does."""

    def find() -> Worker | None:
        return next((one for one in workers if one.process and holds(one.describe().load)), None)

    return wait_until(find, 30, "a worker to be busy")


def prefilling(load: Any) -> bool:
    return load.running > 0 and load.backlog_tokens >= 64


@contextmanager
def frozen_worker(worker: Worker) -> Iterator[None]:
    pids = worker.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGCONT)


each_transport = pytest.mark.parametrize("system", ["nixl", "tcp"], indirect=True)
"""For what goes wrong while KV moves."""
one_transport = pytest.mark.parametrize("system", ["nixl"], indirect=True)


@pytest.fixture(scope="module")
def system(request: pytest.FixtureRequest, slow_llama: Path) -> Iterator[Cluster]:
    with cluster(
        slow_llama,
        prefill=2,
        decode=2,
        transport=request.param,
        worker=WORKER,
        prefill_worker={"lease_ttl_s": "4s"},
        router=ROUTER,
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def whole_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Before each test on the shared system every worker runs and every cache is empty."""
    if "system" in request.fixturenames:
        system: Cluster = request.getfixturevalue("system")
        for worker in system.workers:
            if worker.process is None:
                worker.start()
        system.wait_ready()
        for worker in system.workers:
            worker.flush_cache()
    yield


@each_transport
def test_prefill_killed_mid_prefill(system: Cluster, expected: list[int]) -> None:
    stream = Stream(system)
    victim = busy(system.prefill, prefilling)
    assert not stream.ids
    victim.kill()
    stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
    system.wait_balanced()


@one_transport
def test_decode_killed_mid_decode(system: Cluster, expected: list[int]) -> None:
    stream = Stream(system)
    wait_until(lambda: len(stream.ids) >= 5, 30, "five tokens")
    victim = busy(system.decode, lambda load: load.running > 0)
    victim.kill()
    assert len(stream.ids) < MAX_TOKENS
    stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
    system.wait_balanced()


@each_transport
def test_decode_killed_while_blocks_are_pulled(system: Cluster, expected: list[int]) -> None:
    stream = Stream(system)
    busy(system.prefill, prefilling)
    victim = busy(system.decode, lambda load: load.leases > 0)
    victim.kill()
    stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
    # Prefill keeps what the dead worker may still read until that lease runs out.
    system.wait_balanced(45)


@each_transport
def test_prefill_frozen_mid_prefill(system: Cluster, expected: list[int]) -> None:
    stream = Stream(system)
    victim = busy(system.prefill, prefilling)
    with frozen_worker(victim):
        stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
    system.wait_balanced(45)


@one_transport
def test_decode_frozen_mid_decode(system: Cluster, expected: list[int]) -> None:
    stream = Stream(system)
    wait_until(lambda: len(stream.ids) >= 5, 30, "five tokens")
    victim = busy(system.decode, lambda load: load.running > 0)
    with frozen_worker(victim):
        stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
    system.wait_balanced(45)


@one_transport
def test_seeded_answer_is_the_same_after_decode_was_killed(system: Cluster) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "frequency_penalty": 0.5}
    calm = Stream(system, **sampling)
    calm.wait()
    assert len(calm.ids) == MAX_TOKENS
    stream = Stream(system, **sampling)
    wait_until(lambda: len(stream.ids) >= 5, 30, "five tokens")
    busy(system.decode, lambda load: load.running > 0).kill()
    assert len(stream.ids) < MAX_TOKENS
    stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (calm.ids, "length", None)
    system.wait_balanced()


@one_transport
def test_engine_frozen_behind_a_live_service(system: Cluster, expected: list[int]) -> None:
    """The service still answers; the age of the engine's heartbeat tells the truth."""
    stream = Stream(system)
    wait_until(lambda: len(stream.ids) >= 5, 30, "five tokens")
    victim = busy(system.decode, lambda load: load.running > 0)
    with frozen(victim.pids[1]):
        wait_until(
            lambda: http_status(f"http://127.0.0.1:{victim.metrics_port}/healthz") == 503,
            15,
            "the worker to say that its engine hangs",
        )
        stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
    system.wait_balanced(45)


@one_transport
def test_worker_told_to_end_finishes_what_it_runs(system: Cluster, expected: list[int]) -> None:
    stream = Stream(system)
    wait_until(lambda: len(stream.ids) >= 3, 30, "three tokens")
    victim = busy(system.decode, lambda load: load.running > 0)
    assert victim.process is not None
    victim.process.signal(signal.SIGTERM)
    stream.wait()
    assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
    assert victim.process.wait(20) == 0
    victim.kill()


def test_only_prefill_killed_decode_serves_alone(slow_llama: Path, expected: list[int]) -> None:
    with cluster(slow_llama, worker=WORKER, router=ROUTER) as system:
        stream = Stream(system)
        busy(system.prefill, prefilling).kill()
        stream.wait()
        assert (stream.ids, stream.finish, stream.error) == (expected, "length", None)
        system.wait_balanced()
        # New requests are served too, and say how.
        later = system.openai().completions.with_raw_response.create(
            model=system.get("/v1/models").json()["data"][0]["id"], prompt="Hello", max_tokens=2
        )
        assert later.headers["x-diptych-mode"] == "decode_only"


def test_last_worker_killed_ends_in_one_clear_error(slow_llama: Path) -> None:
    with cluster(slow_llama, prefill=0, decode=1, worker=WORKER, router=ROUTER) as system:
        stream = Stream(system)
        wait_until(lambda: len(stream.ids) >= 3, 30, "three tokens")
        began = time.monotonic()
        system.decode[0].kill()
        stream.wait()
        assert time.monotonic() - began < 20
        assert stream.error is not None
        assert stream.error["code"] in ("unavailable", "worker_lost")
        assert system.get("/health").status_code == 200
        assert system.get("/ready").status_code == 503
        system.decode[0].start()
        system.wait_ready()
        again = Stream(system, max_tokens=4)
        again.wait()
        assert len(again.ids) == 4
        system.wait_balanced()


def test_engine_process_killed_ends_its_service(slow_llama: Path) -> None:
    """A worker is one thing: whoever supervises it sees it end and can start it again."""
    with cluster(slow_llama, prefill=0, decode=1, worker=WORKER, router=ROUTER) as system:
        service, engine = system.decode[0].pids
        os.kill(engine, signal.SIGKILL)
        assert system.decode[0].process is not None
        assert system.decode[0].process.wait(20) == 1
        assert not alive(service)
