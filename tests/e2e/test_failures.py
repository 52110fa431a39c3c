"""Workers that die or freeze mid-work: the answer comes out unchanged, or one clear error does."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import QUICK_START, Cluster, cluster
from tests.support.process import alive, frozen, http_status, wait_until
from tests.support.stream import LONG_TOKENS, Stream, busy, prefilling

WORKER = {**QUICK_START, "max_step_tokens": 64, "stall_after_s": "3s"}
ROUTER = {"worker_silence_s": "2s", "no_worker_grace_s": "2s", "request_timeout_s": "60s"}


@pytest.fixture(scope="module")
def system(slow_llama: Path) -> Iterator[Cluster]:
    with cluster(
        slow_llama,
        prefill=2,
        decode=2,
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


def test_prefill_killed_mid_prefill(system: Cluster, long_answer: list[int]) -> None:
    # Met elsewhere: Decode had to be restarted when prefill died.
    stream = Stream(system)
    victim = busy(system.prefill, prefilling)
    assert not stream.ids
    victim.kill()
    assert stream.ends_like(long_answer)
    system.wait_balanced()


def test_decode_killed_mid_decode(system: Cluster, long_answer: list[int]) -> None:
    stream = Stream(system)
    wait_until(lambda: len(stream.ids) >= 5, 30, "five tokens")
    victim = busy(system.decode, lambda load: load.running > 0)
    victim.kill()
    assert len(stream.ids) < LONG_TOKENS
    assert stream.ends_like(long_answer)
    system.wait_balanced()


def test_decode_killed_while_blocks_are_pulled(system: Cluster, long_answer: list[int]) -> None:
    stream = Stream(system)
    busy(system.prefill, prefilling)
    victim = busy(system.decode, lambda load: load.leases > 0)
    victim.kill()
    assert stream.ends_like(long_answer)
    # Prefill keeps what the dead worker may still read until that lease runs out.
    system.wait_balanced(45)


def test_prefill_frozen_mid_prefill(system: Cluster, long_answer: list[int]) -> None:
    stream = Stream(system)
    victim = busy(system.prefill, prefilling)
    with victim.frozen():
        assert stream.ends_like(long_answer)
    system.wait_balanced(45)


def test_decode_frozen_mid_decode(system: Cluster, long_answer: list[int]) -> None:
    stream = Stream(system)
    wait_until(lambda: len(stream.ids) >= 5, 30, "five tokens")
    victim = busy(system.decode, lambda load: load.running > 0)
    with victim.frozen():
        assert stream.ends_like(long_answer)
    system.wait_balanced(45)


def test_engine_frozen_behind_a_live_service(system: Cluster, long_answer: list[int]) -> None:
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
        assert stream.ends_like(long_answer)
    system.wait_balanced(45)


def test_only_prefill_killed_decode_serves_alone(slow_llama: Path, long_answer: list[int]) -> None:
    # Met elsewhere: Requests ran on decode alone, and nothing said so.
    with cluster(slow_llama, worker=WORKER, router=ROUTER) as system:
        stream = Stream(system)
        busy(system.prefill, prefilling).kill()
        assert stream.ends_like(long_answer)
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
        assert "Traceback" not in system.decode[0].process.log, "its links end by themselves"
