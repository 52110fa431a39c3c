"""A node that does not lead: how long it waits, what ends it, and whom its exit status blames."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from core.sampling import SamplingParams
from engine.build import build_executor
from engine.executor import Executor, ExecutorLostError
from engine.parallel.pipe import Frame
from engine.plan import Chunk, SampleSpec, StepPlan
from prefill.settings import PrefillSettings
from rpc.auth import Credentials
from rpc.server import build_server
from rpc.v1 import nodes_pb2, nodes_pb2_grpc
from tests.support.models import make_checkpoint
from tests.support.nodes import CREDENTIALS, TOKEN, follower_settings, leading, node_settings
from tests.support.process import (
    alive,
    command_line,
    descendants,
    free_port,
    http_status,
    running,
    wait_until,
)
from worker.following import serve_follower
from worker.settings import engine_config

SOON_S = 15.0
NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


async def follow(settings: PrefillSettings, credentials: Credentials = CREDENTIALS) -> int:
    """Exit status of a node that ends by itself."""
    async with asyncio.timeout(SOON_S):
        return await serve_follower(settings, "prefill", credentials, asyncio.Queue())


@asynccontextmanager
async def following(
    settings: PrefillSettings,
) -> AsyncIterator[tuple["asyncio.Task[int]", "asyncio.Queue[int]", int]]:
    """A node with its rank's process: (exit status to come, its signals, the process)."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    task = asyncio.create_task(serve_follower(settings, "prefill", CREDENTIALS, signals))

    def rank() -> int | None:
        below = descendants(os.getpid())
        return next((pid for pid in below if "worker.rank" in command_line(pid)), None)

    try:
        pid = await asyncio.to_thread(wait_until, rank, SOON_S, "the node's rank")
        assert command_line(pid).endswith(" 127.0.0.2"), "where peers find its KV"
        yield task, signals, pid
        assert not alive(pid)
    finally:
        task.cancel()


async def test_a_leader_that_does_not_come_is_waited_for_and_then_named(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert await follow(follower_settings(model, NOBODY, start_timeout_s=1.2)) == 3
    assert f"waiting for the leader at {NOBODY}: " in caplog.text
    assert f"The leader at {NOBODY} was not there within 1 s: failed to connect" in caplog.text


async def test_a_node_that_the_leader_refuses_says_why(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with leading(node_settings(model)) as leader:
        assert await follow(follower_settings(model, leader.address, block_size=32)) == 2
        assert (
            "does not take node 1: block_size is 16 on the leader and 32 on node 1" in caplog.text
        )
        other = follower_settings(make_checkpoint(tmp_path, seed=1), leader.address)
        assert await follow(other) == 2
        assert "model digest is " in caplog.text
        assert await follow(follower_settings(model, leader.address), Credentials(token="no")) == 2
        assert "carries no valid token" in caplog.text
        assert await follow(follower_settings(tmp_path / "none", leader.address)) == 2
        assert "does not exist" in caplog.text
        assert leader.service.missing.startswith("node 1")
    lone = build_server(CREDENTIALS, services=[])  # a worker of one node
    port = lone.bind("127.0.0.1", 0)
    await lone.start()
    assert await follow(follower_settings(model, f"127.0.0.1:{port}")) == 2
    await lone.stop(0)


async def test_a_node_ends_with_the_leader_whose_last_word_it_repeats(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with leading(node_settings(model)) as leader:
        settings = follower_settings(model, leader.address, metrics_port=free_port())
        async with following(settings) as (status, _, _):
            url = f"http://127.0.0.2:{settings.metrics_port}"
            assert await asyncio.to_thread(http_status, f"{url}/healthz") == 200
            assert await asyncio.to_thread(http_status, f"{url}/readyz") == 503
            assert leader.service.missing == ""
            await leader.service.dismiss("Node 2 (ten) was lost.")
            assert await status == 3
    assert f"The leader at {leader.address} is gone: Node 2 (ten) was lost." in caplog.text


class SilentLeader(nodes_pb2_grpc.NodesServicer):
    """Takes a node and says nothing more."""

    async def Join(self, request_iterator: object, context: Any) -> None:
        await context.read()
        hello = nodes_pb2.LeaderHello(rendezvous_port=1, rendezvous_name="n", silence_ms=700)
        await context.write(nodes_pb2.LeaderMessage(hello=hello))
        while await context.read() is not grpc.aio.EOF:
            pass


async def test_a_leader_that_falls_silent_is_gone(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = build_server(CREDENTIALS, services=[])
    nodes_pb2_grpc.add_NodesServicer_to_server(SilentLeader(), server.grpc_server)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        async with following(follower_settings(model, f"127.0.0.1:{port}")) as (status, _, _):
            assert await status == 3
    finally:
        await server.stop(0)
    assert "is gone: no sign of life for 0.7 s" in caplog.text


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "the connection broke"), (signal.SIGSTOP, "no sign of life for 2.0 s")],
)
async def test_a_leader_that_dies_or_freezes_takes_its_nodes_along(
    model: Path, caplog: pytest.LogCaptureFixture, number: signal.Signals, said: str
) -> None:
    port = free_port()
    command = [
        *(sys.executable, "-m", "prefill", "--model", str(model), "--port", str(port)),
        *("--nodes", "2", "--tensor-parallel-size", "2", "--rendezvous-port", "0"),
        *(
            "--device",
            node_settings(model).device,
            "--num-blocks",
            "64",
            "--num-threads",
            "1",
            "--kv-transport",
            "tcp",
        ),
        *("--node-timeout-s", "2s"),
    ]
    with running(command, name="leader", env={"DIPTYCH_PREFILL_AUTH_TOKEN": TOKEN}) as leader:
        settings = follower_settings(model, f"127.0.0.1:{port}")
        async with following(settings) as (status, _, _):
            leader.signal(number)
            assert await status == 3, leader.log
    assert f"The leader at 127.0.0.1:{port} is gone: {said}" in caplog.text


async def test_a_rank_that_dies_ends_the_node_and_is_told_of(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with leading(node_settings(model)) as leader:
        async with following(follower_settings(model, leader.address)) as (status, _, pid):
            os.kill(pid, signal.SIGKILL)
            assert await status == 1
        kind, body, _ = await leader.receive()
        assert kind == Frame.LOST
        assert body == b"Node 1 (127.0.0.2) was lost: rank 1 was ended by signal SIGKILL."
    assert "This node fails: rank 1 was ended by signal SIGKILL" in caplog.text


async def test_a_node_that_is_told_to_stop_while_it_loads_does_so_at_once(model: Path) -> None:
    async with leading(node_settings(model)) as leader:
        async with following(follower_settings(model, leader.address)) as (status, signals, _):
            signals.put_nowait(signal.SIGTERM)
            assert await status == 0
        assert not leader.service.stopping.is_set()


def step(executor: Executor) -> int | None:
    spec = SampleSpec(SamplingParams(temperature=0), 0, (), ())
    return executor.submit(StepPlan([Chunk("a", [5] * 20, 0, [3, 1], spec)])).wait().token_ids[0]


async def test_two_nodes_compute_what_one_would_and_end_in_order(model: Path) -> None:
    settings = node_settings(model)
    alone = build_executor(replace(engine_config(settings), nodes=1, tensor_parallel_size=1))
    expected = step(alone)
    alone.close()
    async with leading(settings) as leader:
        async with following(follower_settings(model, leader.address)) as (status, signals, _):
            executor = await asyncio.to_thread(leader.executor, settings)
            assert await asyncio.to_thread(step, executor) == expected
            signals.put_nowait(signal.SIGTERM)  # what runs may finish first
            async with asyncio.timeout(SOON_S):
                await leader.service.stopping.wait()
            assert await asyncio.to_thread(step, executor) == expected
            await asyncio.to_thread(executor.close)
            assert await status == 0
        assert not leader.service._lost.done()


async def test_a_killed_rank_of_another_node_ends_the_step(model: Path) -> None:
    settings = node_settings(model)
    async with (
        leading(settings) as leader,
        following(follower_settings(model, leader.address)) as (status, _, pid),
    ):
        executor = await asyncio.to_thread(leader.executor, settings)
        await asyncio.to_thread(step, executor)
        os.kill(pid, signal.SIGKILL)

        def until_error() -> None:
            while True:
                step(executor)

        with pytest.raises(ExecutorLostError, match=r"Node 1 .* rank 1 .* by signal SIGKILL"):
            await asyncio.to_thread(until_error)
        assert await status == 1
        await asyncio.to_thread(executor.close)
