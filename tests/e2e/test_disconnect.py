"""A client that goes away frees everything within a second, whatever stage its request is in."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cluster import QUICK_START, Cluster, cluster
from tests.support.process import wait_until

FREED_WITHIN_S = 1.0
PROMPT = "The keeper of the lighthouse wrote in her log: " * 20


@pytest.fixture(scope="module", params=["nixl", "tcp"])
def system(request: pytest.FixtureRequest, slow_llama: Path) -> Iterator[Cluster]:
    with cluster(
        slow_llama,
        transport=request.param,
        worker={**QUICK_START, "max_step_tokens": 64, "max_num_seqs": 8},
    ) as running:
        yield running


def body(system: Cluster, **options: Any) -> dict[str, Any]:
    model = system.get("/v1/models").json()["data"][0]["id"]
    return {"model": model, "prompt": PROMPT, "max_tokens": 500, "ignore_eos": True, **options}


def leave_when(system: Cluster, reached: Callable[[], object], **options: Any) -> None:
    """Send a request over a connection of its own and cut that as soon as `reached` holds."""
    request = httpx.Request("POST", f"{system.url}/v1/completions", json=body(system, **options))
    import socket

    connection = socket.create_connection(("127.0.0.1", system.port), timeout=10)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    content = request.content
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    try:
        wait_until(reached, 30, "the stage to be reached", lambda: system.log)
    finally:
        connection.close()


def some_load(system: Cluster, holds: Callable[[Any], bool]) -> Callable[[], bool]:
    return lambda: any(holds(worker.describe().load) for worker in system.workers)


@pytest.mark.parametrize("stream", [True, False])
def test_mid_prefill(system: Cluster, stream: bool) -> None:
    # Met elsewhere: The client had gone, and prefill went on through 128k tokens.
    for worker in system.workers:
        worker.flush_cache()
    leave_when(system, some_load(system, lambda load: load.backlog_tokens > 64), stream=stream)
    assert system.wait_balanced() < FREED_WITHIN_S


@pytest.mark.parametrize("stream", [True, False])
def test_mid_decode(system: Cluster, stream: bool) -> None:
    decode = system.decode[0]
    leave_when(system, lambda: decode.describe().load.running > 0, stream=stream)
    assert system.wait_balanced() < FREED_WITHIN_S


def test_while_waiting_in_the_queue(system: Cluster) -> None:
    """More choices than the workers run at once: some wait when the client leaves."""
    for worker in system.workers:
        worker.flush_cache()
    leave_when(system, some_load(system, lambda load: load.waiting > 0), n=20, stream=True)
    assert system.wait_balanced() < FREED_WITHIN_S


def test_while_blocks_are_pulled(system: Cluster) -> None:
    decode = system.decode[0]
    for round_no in range(5):
        for worker in system.workers:
            worker.flush_cache()
        leave_when(
            system,
            lambda: decode.describe().load.held_blocks > 0,
            stream=True,
            prompt=f"{round_no} {PROMPT}",
        )
        assert system.wait_balanced() < FREED_WITHIN_S


def test_before_a_worker_has_said_anything(system: Cluster) -> None:
    # Met elsewhere: A client that left before decode took its request stranded the prompt's
    # KV for minutes.
    for _ in range(10):
        leave_when(system, lambda: True, stream=True)
    assert system.wait_balanced() < 5.0
