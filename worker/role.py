"""What a role adds to the engine loop: the seam that prefill/ and decode/ fill.

Every worker computes prompts and generates; a role is where the KV of a request goes to or comes
from. All methods run in the engine loop's thread, between steps, and never wait.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import CollectorRegistry

from core.errors import DiptychError
from core.finish import FinishReason
from core.tokens import TokenLogprobs
from engine.engine import Engine
from engine.executor import OtherRanks
from engine.request import EngineRequest, StepOutputs
from kvtransfer.messages import Key
from kvtransfer.transport import BlockPool
from rpc.v1 import ipc_pb2, worker_pb2
from telemetry.faults import Faults


def engine_id(key: Key) -> str:
    """The engine's name for an attempt: an old one may still be ending when a new one starts."""
    return f"{key.request_id}#{key.attempt}"


@dataclass(slots=True)
class Submission:
    """A request as it lives on this worker, from Submit to Finished."""

    key: Key
    channel: int
    request: EngineRequest
    deadline: float
    """On this host's monotonic clock, in seconds."""
    submitted_at: float
    submit: worker_pb2.Submit
    """The message it came in; its oneof says where KV goes to or comes from."""
    scheduled_at: float | None = None
    """When the step began that first worked on it."""
    first_token_at: float | None = None
    received_at: float | None = None
    """Decode: when the last block was read."""
    tokens_told: int = 0
    """How many tokens its router was sent from here."""
    cached_tokens: int = 0
    kv_bytes: int = 0
    times: worker_pb2.StageTimes = field(default_factory=worker_pb2.StageTimes)


class Outbox(Protocol):
    """What a role may say to the rest of the worker."""

    def send(self, event: ipc_pb2.EngineEvent) -> None:
        """To the service process."""
        ...

    def emit_token(
        self, submission: Submission, token_id: int, logprobs: TokenLogprobs | None
    ) -> None:
        """Tell the router of a token that the engine did not sample in a step here."""
        ...

    def fail(self, key: Key, error: DiptychError) -> None:
        """End a submission with a cause; its router decides what comes next."""
        ...

    def finish(
        self, submission: Submission, reason: FinishReason, *, matched_stop: int | None = None
    ) -> None:
        """End a submission well."""
        ...

    def find(self, key: Key) -> Submission | None:
        """The live submission of that name."""
        ...


class Role(Protocol):
    """A role's part of the engine loop."""

    @property
    def role(self) -> "worker_pb2.Role":
        """What routers are told."""
        ...

    @property
    def transports(self) -> list[str]:
        """Names of the KV transports in use, best first."""
        ...

    @property
    def leases(self) -> int:
        """Hand-overs under way; a drain waits for them."""
        ...

    def submit(self, submission: Submission) -> None:
        """Take a submission whose phase is not `local`. Raises DiptychError to refuse it."""
        ...

    def abort(self, submission: Submission) -> None:
        """Its router took it back; the submission is gone when this returns."""
        ...

    def withdraw(self, key: Key, channel: int) -> None:
        """The router on `channel` took back what has ended here already, or is not known."""
        ...

    def receive(self, command: ipc_pb2.EngineCommand) -> None:
        """A KvExport frame, or word that a channel closed."""
        ...

    def after_step(self, outputs: StepOutputs) -> None:
        """A step ended; finished sequences still hold their blocks."""
        ...

    def turn(self, now: float) -> None:
        """Once per turn of the loop: look at transfers, clocks and waiting hand-overs."""
        ...

    def wait_s(self, now: float) -> float:
        """Longest the loop may sleep when the engine is idle, in seconds."""
        ...

    def report(self, load: worker_pb2.LoadReport) -> None:
        """Add to a load report what only the role knows."""
        ...

    def observe(self) -> None:
        """Bring metrics up to date; called before they are rendered."""
        ...

    def close(self) -> None:
        """The loop has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleContext:
    """What a role is built from, once the engine exists."""

    engine: Engine
    pool: BlockPool
    """Of this process; with several ranks, of rank 0."""
    ranks: OtherRanks | None
    """The other ranks, if there are."""
    outbox: Outbox
    description: worker_pb2.WorkerDescription
    registry: CollectorRegistry
    faults: Faults = field(default_factory=Faults)


BuildRole = Callable[[RoleContext], Role]
