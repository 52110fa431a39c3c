"""What fails on purpose in an engine process: the pipe to it, and its steps.

Put around the real ones by worker/engine_process.py, and only while faults are on.
"""

import time
from typing import TYPE_CHECKING

from core.errors import UnavailableError
from engine.executor import Executor, OtherRanks, PendingStep
from engine.plan import StepPlan, StepResult
from rpc.v1 import ipc_pb2, worker_pb2
from telemetry.faults import Effect, Faults, InjectedFaultError, Point
from worker.ipc import CommandPipe

if TYPE_CHECKING:
    from engine.kv.pool import KVPool
    from engine.models.config import ModelConfig


class FaultyPipe:
    """An EnginePipe on which requests are refused, and renewals and probes get lost."""

    def __init__(self, inner: CommandPipe, faults: Faults) -> None:
        """Around `inner`."""
        self._inner = inner
        self._faults = faults

    def receive(self, timeout_s: float) -> list[ipc_pb2.EngineCommand]:
        """See EnginePipe; without the requests that are refused."""
        commands = self._inner.receive(timeout_s)
        return [command for command in commands if not self._refused(command)]

    def send(self, event: ipc_pb2.EngineEvent) -> None:
        """See EnginePipe; what is lost is not sent."""
        body = event.decode.message.WhichOneof("body") if event.HasField("decode") else None
        point = {"renew": Point.LEASE_RENEW, "probe": Point.KV_PROBE}.get(body or "")
        if point is None or self._faults.at(point) is None:
            self._inner.send(event)

    def _refused(self, command: ipc_pb2.EngineCommand) -> bool:
        if command.WhichOneof("body") != "router" or not command.router.message.HasField("submit"):
            return False
        rule = self._faults.at(Point.SUBMIT)
        if rule is None:
            return False
        submit = command.router.message.submit
        finished = worker_pb2.Finished(
            request_id=submit.request_id,
            attempt=submit.attempt,
            reason=worker_pb2.FINISH_REASON_FAILED,
            error_code=UnavailableError.code,
            error_message=f"Injected fault {rule.point}:{rule.effect}.",
        )
        message = worker_pb2.WorkerMessage(finished=finished)
        frame = ipc_pb2.WorkerFrame(channel=command.router.channel, message=message)
        self._inner.send(ipc_pb2.EngineEvent(worker=frame))
        return True


class FaultyExecutor:
    """Implements Executor: steps that are late or fail."""

    def __init__(self, inner: Executor, faults: Faults) -> None:
        """Around `inner`."""
        self._inner = inner
        self._faults = faults

    @property
    def model_config(self) -> "ModelConfig":
        """See Executor."""
        return self._inner.model_config

    @property
    def model_digest(self) -> bytes:
        """See Executor."""
        return self._inner.model_digest

    @property
    def pool(self) -> "KVPool":
        """See Executor."""
        return self._inner.pool

    @property
    def ranks(self) -> OtherRanks | None:
        """See Executor."""
        return self._inner.ranks

    @property
    def overlaps(self) -> bool:
        """See Executor."""
        return self._inner.overlaps

    def submit(self, plan: StepPlan) -> PendingStep:
        """See Executor."""
        return _FaultyStep(self._inner.submit(plan), self._faults)

    def close(self) -> None:
        """See Executor."""
        self._inner.close()


class _FaultyStep:
    """A PendingStep that fails, if it does, once it was computed: nothing is in flight then."""

    def __init__(self, inner: PendingStep, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def wait(self) -> StepResult:
        result = self._inner.wait()
        rule = self._faults.at(Point.ENGINE_STEP)
        if rule is not None and rule.effect is Effect.RAISE:
            raise InjectedFaultError(f"injected fault {rule.point}:{rule.effect}")
        if rule is not None:
            time.sleep(rule.seconds)
        return result
