"""The engine process of a worker: builds the engine, then turns its loop until the pipe closes.

Started by the service process with one end of the pipe as an inherited descriptor. What it is to
build arrives over the pipe, since it holds secrets.
"""

import logging
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import xxhash

from core.clock import monotonic
from core.errors import DiptychError
from core.settings import secret_values
from core.version import PROTOCOL, installed_version
from engine.build import build_executor
from engine.engine import Engine
from engine.executor import Executor, ExecutorLostError
from engine.grammar.build import build_grammars
from engine.metrics import EngineMetrics
from engine.parallel.meeting import Meeting
from engine.parallel.peers import OtherNodes
from kvtransfer.wire import layout_to_proto
from rpc.v1 import ipc_pb2, worker_pb2
from telemetry.faults import Faults, Point, parse_faults
from telemetry.logs import setup
from telemetry.metrics import ProcessRegistry
from worker.convert import error_of
from worker.faulty import FaultyExecutor, FaultyPipe
from worker.ipc import CommandPipe, EnginePipe, PipeClosedError
from worker.loop import EngineLoop
from worker.role import BuildRole, Outbox, Role, RoleContext
from worker.settings import WorkerSettings, engine_config

log = logging.getLogger(__name__)

RANK_MODULE = "worker.rank"
"""The process of each rank above 0."""
_START_TIMEOUT_S = 60.0


S = TypeVar("S", bound=WorkerSettings)


def run_engine(fd: int, settings_class: type[S], build_role: Callable[[S], BuildRole]) -> int:
    """Serve one engine over the pipe at `fd`; returns the process's exit status."""
    # Ctrl-C reaches the whole process group; the service decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = EnginePipe(socket.socket(fileno=fd))
    try:
        start = _await_start(pipe)
        settings = settings_class.model_validate_json(start.settings_json)
        name = f"engine-{settings.worker_id}"
        setup(settings.log_level, settings.log_format, name, secrets=secret_values(settings))
        nodes = _other_nodes(settings, start.nodes) if start.HasField("nodes") else None
        loop = _build(settings, build_role(settings), pipe, nodes)
    except PipeClosedError:
        return 0
    except Exception as error:
        # The service says what is told here; where in the code it arose is worth a line only if
        # nobody has foreseen it.
        level = logging.DEBUG if isinstance(error, DiptychError) else logging.ERROR
        log.log(level, "the engine could not start", exc_info=True)
        code, message = error_of(error)
        failed = ipc_pb2.StartupFailed(error_code=code, error_message=message)
        with suppress(PipeClosedError):  # the service may have given up first
            pipe.send(ipc_pb2.EngineEvent(failed=failed))
        return 1
    try:
        loop.run()
    except PipeClosedError as error:
        log.info("the service process is gone: %s", error)
    except ExecutorLostError:
        return 1  # logged where it was noticed; whoever supervises the worker starts it afresh
    finally:
        pipe.close()
    return 0


def _await_start(pipe: EnginePipe) -> ipc_pb2.Start:
    for command in pipe.receive(_START_TIMEOUT_S):
        if command.WhichOneof("body") == "start":
            return command.start
    raise PipeClosedError("no Start arrived")


def _other_nodes(settings: WorkerSettings, told: ipc_pb2.OtherNodes) -> OtherNodes:
    meeting = Meeting(
        own_host=settings.own_host,
        leader_host=settings.own_host,
        port=told.rendezvous_port,
        name=told.rendezvous_name,
        listen_fd=told.listen_fd,
    )
    pipes = [socket.socket(fileno=fd) for fd in told.pipe_fds]
    return OtherNodes(pipes=pipes, meeting=meeting)


def _build(
    settings: WorkerSettings,
    build_role: BuildRole,
    pipe: CommandPipe,
    elsewhere: OtherNodes | None,
) -> EngineLoop:
    def progress(stage: str) -> None:
        pipe.send(ipc_pb2.EngineEvent(progress=ipc_pb2.StartupProgress(stage=stage)))

    faults = Faults(parse_faults(settings.faults), settings.worker_id or "")
    faults.announce()
    config = engine_config(settings)
    executor = build_executor(config, progress, rank_module=RANK_MODULE, elsewhere=elsewhere)
    if faults.has(Point.ENGINE_STEP):
        executor = FaultyExecutor(executor, faults)
    if faults.has(Point.SUBMIT, Point.LEASE_RENEW, Point.KV_PROBE):
        pipe = FaultyPipe(pipe, faults)
    registry = ProcessRegistry()
    dtype = executor.pool.layout.dtype
    digest = _kv_digest(executor.model_digest, dtype)
    metrics = EngineMetrics(registry)
    progress("reading the vocabulary for structured output")
    grammars = build_grammars(config, executor.model_config)
    engine = Engine(config, executor, model_digest=digest, metrics=metrics, grammars=grammars)
    pool = executor.pool
    metrics.describe_cache(block_size=pool.layout.block_size, num_blocks=pool.num_blocks)
    metrics.describe_batch(max_num_seqs=engine.max_num_seqs)
    description = describe(settings, engine, executor, digest)

    def role(outbox: Outbox) -> Role:
        return build_role(
            RoleContext(
                engine=engine,
                pool=executor.pool,
                ranks=executor.ranks,
                outbox=outbox,
                description=description,
                registry=registry,
                faults=faults,
            )
        )

    return EngineLoop(
        engine=engine,
        build_role=role,
        pipe=pipe,
        description=description,
        heartbeat_interval_s=settings.heartbeat_interval_s,
        clock=monotonic,
        metrics=metrics,
        registry=registry,
    )


def _kv_digest(digest: bytes, dtype: str) -> bytes:
    """KV is interchangeable only if weights and the precision they ran in are equal."""
    return xxhash.xxh3_128_digest(digest + dtype.encode())


def describe(
    settings: WorkerSettings, engine: Engine, executor: Executor, digest: bytes
) -> worker_pb2.WorkerDescription:
    """Who this worker is; the role adds its own part."""
    model, pool = executor.model_config, executor.pool
    address = f"{settings.own_host}:{settings.port}"
    return worker_pb2.WorkerDescription(
        worker_id=settings.worker_id or "",
        epoch=secrets.randbits(64) or 1,
        model=settings.served_model_name or "",
        model_digest=digest,
        layout=layout_to_proto(pool.layout.with_heads(model.num_kv_heads)),
        num_blocks=pool.num_blocks,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        version=installed_version(),
        kv_address=address,
        place=worker_pb2.Place(zone=settings.zone, rack=settings.rack, host=settings.node),
        protocol=PROTOCOL,
    )


def pipe_fd(argv: list[str]) -> int:
    """The descriptor that the service process passed on the command line."""
    if len(argv) != 2 or not argv[1].isdigit():
        sys.exit("This module is started by its worker; use `diptych prefill` or `diptych decode`.")
    return int(argv[1])
