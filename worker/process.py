"""The service process of a worker: starts the engine, serves gRPC, reports load, shuts down.

It holds no model and no KV, and does not import torch. If the engine process ends unasked, so does
this one with a non-zero status: whoever supervises the worker starts both afresh, with a new epoch.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Protocol

import grpc
from prometheus_client import CollectorRegistry

from core.clock import monotonic
from engine.threads import available_cores, compute_thread_env
from kvtransfer.nixl import ucx_environment
from rpc.auth import Credentials
from rpc.server import build_server
from rpc.v1 import ipc_pb2, worker_pb2, worker_pb2_grpc
from telemetry.metrics import serve_metrics
from worker.ipc import ServicePipe, open_pipe
from worker.service import EngineView, WorkerService
from worker.settings import WorkerSettings
from worker.switchboard import Switchboard

log = logging.getLogger(__name__)

WORKER_SERVICE = "diptych.v1.Worker"
_ENGINE_EXIT_S = 10.0
_SERVER_GRACE_S = 1.0


class Extension(Protocol):
    """What a role adds to the service process."""

    def register(self, server: grpc.aio.Server) -> None:
        """Add services before the server starts."""
        ...

    def open_link(self, request: ipc_pb2.OpenLink) -> None:
        """The engine wants a KvExport link."""
        ...

    async def close(self) -> None:
        """Drop what was opened."""
        ...


BuildExtension = Callable[[Switchboard, Credentials], Extension]


class EngineFailedError(Exception):
    """The engine process could not start, or ended unasked."""


def credentials_of(settings: WorkerSettings) -> Credentials:
    """What this worker proves itself with, and asks of its peers."""
    token = settings.auth_token
    return Credentials.from_settings(
        token=token.get_secret_value() if token else None,
        cert=settings.tls_cert,
        key=settings.tls_key,
        ca=settings.tls_ca,
    )


async def serve_worker(
    settings: WorkerSettings,
    *,
    role: str,
    engine_module: str,
    build_extension: BuildExtension,
    role_services: Sequence[str] = (),
) -> int:
    """Run a worker until SIGTERM or SIGINT; returns the process's exit status."""
    credentials = credentials_of(settings)
    services = [WORKER_SERVICE, *role_services]
    server = build_server(credentials, services=services)
    port = server.bind(settings.host, settings.port, insecure=settings.insecure)
    settings = _settle(settings, role, port)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with AsyncExitStack() as stack:
        engine = await _EngineProcess.start(settings, engine_module)
        stack.push_async_callback(engine.end)
        pipe = engine.pipe
        view = EngineView(stall_after_s=settings.stall_after_s, clock=monotonic)
        switchboard = Switchboard(pipe)
        service = WorkerService(pipe, switchboard, view)
        extension = build_extension(switchboard, credentials)
        stack.push_async_callback(extension.close)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server.grpc_server)
        extension.register(server.grpc_server)
        await server.start()
        stack.push_async_callback(server.stop, _SERVER_GRACE_S)
        metrics = await serve_metrics(
            CollectorRegistry(),
            settings.host,
            settings.metrics_port,
            extra=lambda: [view.metrics],
            healthy=lambda: view.live,
            ready=lambda: view.ready,
        )
        stack.callback(metrics.close)
        metrics_port = metrics.sockets[0].getsockname()[1]
        log.info("listening on %s:%d, metrics on port %d", settings.host, port, metrics_port)
        events = asyncio.create_task(_read_events(pipe, view, switchboard, service, extension))
        reports = asyncio.create_task(_report(view, switchboard, settings.report_interval_s))
        stopping = asyncio.create_task(stop.wait())
        starting = asyncio.create_task(_watch_start(view, settings.start_timeout_s))
        try:
            await asyncio.wait({events, stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not (events.done() or stopping.done()):
                starting.result()
                await server.set_serving(True)
                log.info("%s is ready", settings.worker_id)
                await asyncio.wait({events, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if events.done():
                events.result()
                raise EngineFailedError("the engine process ended unasked")
            if view.ready:
                await _drain(service, settings.drain_timeout_s)
        except EngineFailedError as error:
            log.error("%s", error)
            return 1
        finally:
            for task in (events, reports, stopping, starting):
                task.cancel()
    return 0


def _settle(settings: WorkerSettings, role: str, port: int) -> WorkerSettings:
    """Fill in what follows from the port and the model."""
    model = settings.model.rstrip("/").rsplit("/", 1)[-1]
    return settings.model_copy(
        update={
            "port": port,
            "worker_id": settings.worker_id or f"{role}-{settings.host}:{port}",
            "served_model_name": settings.served_model_name or model,
        }
    )


def settings_json(settings: WorkerSettings) -> bytes:
    """Everything, secrets included: for the engine process's pipe and nowhere else."""
    values = settings.model_dump(mode="json")
    if settings.auth_token is not None:
        values["auth_token"] = settings.auth_token.get_secret_value()
    return json.dumps(values).encode()


class _EngineProcess:
    """The child and the pipe to it."""

    def __init__(self, process: asyncio.subprocess.Process, pipe: ServicePipe) -> None:
        self._process = process
        self.pipe = pipe

    @classmethod
    async def start(cls, settings: WorkerSettings, module: str) -> "_EngineProcess":
        ours, theirs = open_pipe()
        env = {
            **os.environ,
            **compute_thread_env(settings.num_threads or available_cores()),
            **ucx_environment(os.environ, loopback=settings.loopback),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            env=env,
        )
        theirs.close()
        pipe = await ServicePipe.open(ours)
        start = ipc_pb2.Start(settings_json=settings_json(settings))
        pipe.send(ipc_pb2.EngineCommand(start=start))
        return cls(process, pipe)

    async def end(self) -> None:
        """Ask, wait, then kill."""
        with suppress(ConnectionError):
            self.pipe.send(ipc_pb2.EngineCommand(stop=ipc_pb2.Stop()))
        self.pipe.close()
        try:
            async with asyncio.timeout(_ENGINE_EXIT_S):
                await self._process.wait()
        except TimeoutError:
            log.warning("the engine did not end within %.0f s: killing it", _ENGINE_EXIT_S)
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


async def _read_events(
    pipe: ServicePipe,
    view: EngineView,
    switchboard: Switchboard,
    service: WorkerService,
    extension: Extension,
) -> None:
    """Carry out what the engine says until its pipe ends."""
    async for event in pipe.events():
        match event.WhichOneof("body"):
            case "worker":
                switchboard.to_router(event.worker)
            case "heartbeat":
                view.on_heartbeat(event.heartbeat)
            case "prefill":
                switchboard.to_peer(event.prefill)
            case "decode":
                switchboard.to_peer(event.decode)
            case "open":
                extension.open_link(event.open)
            case "close":
                switchboard.close(event.close.channel, event.close.reason)
            case "reply":
                service.on_reply(event.reply)
            case "progress":
                log.info("engine: %s", event.progress.stage)
            case "ready":
                view.description = event.ready.worker
            case "failed":
                raise EngineFailedError(
                    f"the engine could not start ({event.failed.error_code}): "
                    f"{event.failed.error_message}"
                )
            case other:
                log.warning("ignored an engine event of unknown kind %s", other)


async def _watch_start(view: EngineView, timeout_s: float) -> None:
    give_up_at = monotonic() + timeout_s
    while not view.ready:
        if monotonic() > give_up_at:
            raise EngineFailedError(f"the engine was not ready after {timeout_s:.0f} s")
        await asyncio.sleep(0.02)


async def _report(view: EngineView, switchboard: Switchboard, interval_s: float) -> None:
    """Tell every router how this worker fares; their only sign that this process lives."""
    while True:
        switchboard.broadcast(worker_pb2.WorkerMessage(load=view.load()))
        await asyncio.sleep(interval_s)


async def _drain(service: WorkerService, timeout_s: float) -> None:
    log.info("draining for up to %.0f s", timeout_s)
    try:
        response = await service.drain(worker_pb2.DrainRequest(timeout_ms=int(timeout_s * 1000)))
    except TimeoutError:
        log.warning("the engine did not answer the drain")
        return
    if not response.drained:
        log.warning("ending with %d requests and %d leases", response.running, response.leases)
