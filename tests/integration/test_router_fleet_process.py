"""`python -m router` as a process: readiness, a request over HTTP, and how it ends."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.support.fake_worker import FakeWorker, fake_workers, until
from tests.support.process import free_port
from tests.support.router_api import byte_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@asynccontextmanager
async def router_process(
    model: Path, worker: FakeWorker, port: int, *options: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", f"--model={model}", f"--port={port}"),
        *(f"--decode={worker.address}", *options),
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while True:
            with suppress(httpx.TransportError):
                if (await client.get("/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.02)


def completion(client: httpx.AsyncClient, max_tokens: int) -> "asyncio.Task[httpx.Response]":
    body = {"model": "fake", "prompt": "xyz", "max_tokens": max_tokens, "temperature": 0}
    return asyncio.create_task(client.post("/v1/completions", json=body))


async def test_router_process_serves_and_ends_gracefully(model: Path) -> None:
    port = free_port()
    async with (
        fake_workers(decode=1) as (worker,),
        router_process(model, worker, port) as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        await ready(client)
        answer = await completion(client, 5)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 5
        request_id = answer.headers["x-request-id"]
        timeline = (await client.get(f"/v1/requests/{request_id}/timeline")).json()
        assert "decode_only" in json.dumps(timeline)
        metrics = (await client.get("/metrics")).text
        assert 'diptych_router_workers{role="decode",state="ready"} 1.0' in metrics
        assert "process_resident_memory_bytes" in metrics

        worker.running = False
        running = completion(client, 3)
        await until(lambda: worker.busy)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while True:
                try:
                    refused = await client.get("/ready")
                except httpx.TransportError:
                    break
                assert refused.status_code in (200, 503)
                await asyncio.sleep(0.02)
        assert process.returncode is None
        worker.running = True
        assert (await running).json()["usage"]["completion_tokens"] == 3
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def test_second_signal_ends_at_once_and_frees_the_worker(model: Path) -> None:
    port = free_port()
    async with (
        fake_workers(decode=1) as (worker,),
        router_process(model, worker, port) as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        await ready(client)
        worker.running = False
        running = completion(client, 3)
        await until(lambda: worker.busy)
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.1)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            await process.wait()
        await until(lambda: not worker.busy)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_grace_bounds_the_end(model: Path) -> None:
    port = free_port()
    async with (
        fake_workers(decode=1) as (worker,),
        router_process(model, worker, port, "--shutdown-grace-s=0.2") as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        await ready(client)
        worker.running = False
        running = completion(client, 3)
        await until(lambda: worker.busy)
        process.send_signal(signal.SIGTERM)
        answer = await running
        assert answer.status_code == 503
        assert "shutting down" in answer.text
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def test_taken_port_is_a_clear_error(model: Path) -> None:
    async with (
        fake_workers(decode=1) as (worker,),
        router_process(model, worker, worker.port) as process,
    ):
        async with asyncio.timeout(20):
            _, errors = await process.communicate()
        assert process.returncode == 2
        assert b"Choose another host or port" in errors
