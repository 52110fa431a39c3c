"""The whole system as real processes on loopback: a router, prefill workers, decode workers."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
from openai import AsyncOpenAI, OpenAI

from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.support.process import Process, descendants, free_port, frozen, running, wait_until

Settings = Mapping[str, object]
TOKEN = "test-token"
START_S = 120.0
QUICK_START: Settings = {"attention_backend": "torch_native"}
"""Of workers that tests start again and again: without the compiled kernels, loading which takes a
quarter of the processor's time that a start takes."""


@dataclass
class Worker:
    """One worker: where it listens and how to start it again."""

    role: str
    port: int
    metrics_port: int
    command: list[str]
    env: dict[str, str]
    other_nodes: list[list[str]] = field(default_factory=list)
    """Command of each node that does not lead, if the worker spans several."""
    process: Process | None = None
    others: list[Process] = field(default_factory=list)
    """Those nodes, as they run."""
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        """Service process first, then its engine process."""
        assert self.process is not None
        return [self.process.pid, *descendants(self.process.pid)]

    def start(self, *flags: str) -> None:
        """Start it, with other flags behind its own."""
        name = f"{self.role}-{self.port}"
        command = [*self.command, *flags]
        self.process = self.stack.enter_context(running(command, name=name, env=self.env))
        self.others = [
            self.stack.enter_context(
                running([*command, *flags], name=f"{name}/{node}", env=self.env)
            )
            for node, command in enumerate(self.other_nodes, 1)
        ]

    def kill(self) -> None:
        """SIGKILL to service and engine, on every node."""
        self.stack.close()
        self.process = None
        self.others = []

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP to service and engine for the length of the block."""
        with ExitStack() as stack:
            for pid in self.pids:
                stack.enter_context(frozen(pid))
            yield

    def describe(self) -> worker_pb2.DescribeResponse:
        return asyncio.run(self._describe())

    async def _describe(self) -> worker_pb2.DescribeResponse:
        async with open_channel(self.address, Credentials(token=TOKEN)) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return await stub.Describe(worker_pb2.DescribeRequest(), timeout=5)

    def drain(self, *, resume: bool = False) -> None:
        """Let it take no new requests, or take them again."""

        async def call() -> None:
            async with open_channel(self.address, Credentials(token=TOKEN)) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                await stub.Drain(worker_pb2.DrainRequest(resume=resume), timeout=30)

        asyncio.run(call())

    def flush_cache(self) -> int:
        async def call() -> int:
            async with open_channel(self.address, Credentials(token=TOKEN)) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                response = await stub.FlushCache(worker_pb2.FlushCacheRequest(), timeout=30)
                return int(response.freed_blocks)

        return asyncio.run(call())


@dataclass
class Cluster:
    """Running processes and clients to talk to them."""

    router: Process
    port: int
    prefill: list[Worker]
    decode: list[Worker]
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with what this asks the router itself."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefill, *self.decode]

    def openai(self, **options: Any) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options
        )

    def async_openai(self, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options
        )

    def get(self, path: str) -> httpx.Response:
        # Nothing here uses TLS, and reading the CA certificates takes longer than the call.
        return httpx.get(self.url + path, timeout=10, headers=dict(self.headers), verify=False)

    @property
    def log(self) -> str:
        parts = [f"== router\n{self.router.log}"]
        for worker in self.workers:
            if worker.process is not None:
                parts += [f"== {one.name}\n{one.log}" for one in (worker.process, *worker.others)]
        return "\n".join(parts)

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Until every worker that runs is attached to the router."""

        def ready() -> bool:
            for worker in self.workers:
                if worker.process is not None and not worker.process.running:
                    raise AssertionError(f"{worker.role} ended:\n{worker.process.log}")
            if not self.router.running:
                raise AssertionError(f"the router ended:\n{self.router.log}")
            try:
                if self.get("/ready").status_code != 200:
                    return False
            except httpx.TransportError:
                return False
            return all(self._attached(worker) for worker in self.workers if worker.process)

        wait_until(ready, timeout_s, "the cluster to be ready", lambda: self.log)

    def _attached(self, worker: Worker) -> bool:
        try:
            worker.describe()
        except grpc.RpcError:
            return False
        peers = self.prefill if worker.role == "prefill" else self.decode
        running = [peer for peer in peers if peer.process is not None]
        return self.num_attached(worker.role) >= len(running)

    def num_attached(self, role: str) -> int:
        """Workers of a role that the router would send work to; 0 while it does not answer."""
        try:
            text = self.get("/metrics").text
        except httpx.TransportError:
            return 0
        return sum(
            int(float(line.rsplit(" ", 1)[1]))
            for line in text.splitlines()
            if line.startswith("diptych_router_workers{")
            and f'role="{role}"' in line
            and 'state="ready"' in line
        )

    def pools_balanced(self) -> bool:
        """True if no block is held on any worker that runs, and none is lost."""
        for worker in self.workers:
            if worker.process is None:
                continue
            try:
                response = worker.describe()
            except grpc.RpcError:
                return False
            load = response.load
            total = load.free_blocks + load.cached_blocks + load.held_blocks
            assert total == response.worker.num_blocks, f"{worker.role} lost blocks: {load}"
            if load.held_blocks or load.leases or load.running or load.waiting:
                return False
        return True

    def wait_balanced(self, timeout_s: float = 10.0) -> float:
        """Wait until every pool is free or cached again; returns the seconds that took."""
        began = time.monotonic()

        def detail() -> str:
            return "\n".join(
                f"{w.role}: {w.describe().load}" for w in self.workers if w.process is not None
            )

        wait_until(self.pools_balanced, timeout_s, "every pool to balance", detail)
        return time.monotonic() - began


@contextmanager
def cluster(
    model: Path | str,
    *,
    prefill: int = 1,
    decode: int = 1,
    transport: str = "nixl",
    worker: Settings | None = None,
    prefill_worker: Settings | Sequence[Settings] | None = None,
    decode_worker: Settings | Sequence[Settings] | None = None,
    router: Mapping[str, object] | None = None,
    router_env: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[Cluster]:
    """Start a system and end it, checking that it left no block behind.

    Args:
        model: a folder that workers and router load.
        prefill: number of prefill workers.
        decode: number of decode workers.
        transport: how KV moves.
        worker: settings of every worker, by field name.
        prefill_worker: settings of prefill workers alone; or of each, one worker for each.
        decode_worker: the same of decode workers.
        router: settings of the router, by field name.
        router_env: settings of the router that are secret, by the name of their variable.
        headers: of the requests by which it learns how the system is.
        wait: wait until all is ready.
    """
    with ExitStack() as stack:
        pools = {
            role: [
                make_worker(role, model, transport, {**(worker or {}), **settings})
                for settings in (own if isinstance(own, Sequence) else [own or {}] * count)
            ]
            for role, count, own in (
                ("prefill", prefill, prefill_worker),
                ("decode", decode, decode_worker),
            )
        }
        for one in [*pools["prefill"], *pools["decode"]]:
            stack.callback(one.stack.close)
            one.start()
        yield stack.enter_context(
            routed(model, **pools, router=router, router_env=router_env, headers=headers, wait=wait)
        )


@contextmanager
def routed(
    model: Path | str,
    *,
    prefill: list[Worker],
    decode: list[Worker],
    router: Mapping[str, object] | None = None,
    router_env: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    through: Callable[[Worker], str] = lambda worker: worker.address,
    wait: bool = True,
) -> Iterator[Cluster]:
    """A router in front of workers that were started already; others may be in front of them too.

    See `cluster` for the arguments; `through` says at which address the router finds a worker.
    """
    port = free_port()
    options: dict[str, object] = {"port": port, "model": model, **(router or {})}
    for role, workers in (("prefill", prefill), ("decode", decode)):
        if workers:
            options[role] = ",".join(through(one) for one in workers)
    command = [sys.executable, "-m", "router", *_flags(options)]
    env = {"DIPTYCH_ROUTER_AUTH_TOKEN": TOKEN, **(router_env or {})}
    with running(command, name="router", env=env) as process:
        system = Cluster(process, port, prefill, decode, headers or {})
        if wait:
            system.wait_ready()
        yield system


def make_worker(
    role: str, model: Path | str, transport: str, settings: Mapping[str, object] | None = None
) -> Worker:
    """A worker that is not started yet, at ports of its own."""
    port, metrics_port = free_port(), free_port()
    options: dict[str, object] = {
        "model": model,
        "port": port,
        "metrics_port": metrics_port,
        "kv_transport": transport,
        "device": "cpu",
        "kv_cache_memory": "64MiB",
        "num_threads": 1,
        **(settings or {}),
    }
    env = {f"DIPTYCH_{role.upper()}_AUTH_TOKEN": TOKEN}
    others = []
    for node in range(1, int(str(options.get("nodes", 1)))):
        options["rendezvous_port"] = 0
        own = {
            "node_rank": node,
            "leader_address": f"127.0.0.1:{port}",
            "host": f"127.0.0.{node + 1}",
            "port": free_port(),
            "metrics_port": free_port(),
        }
        others.append([sys.executable, "-m", role, *_flags({**options, **own})])
    command = [sys.executable, "-m", role, *_flags(options)]
    return Worker(role, port, metrics_port, command, env, others)


def _flags(options: Mapping[str, object]) -> list[str]:
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def stream_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a server-sent stream, up to [DONE]."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def on_ci() -> bool:
    """True where the machine is shared and slow."""
    return bool(os.environ.get("CI"))
