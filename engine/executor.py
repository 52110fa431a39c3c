"""What the engine asks of whatever computes its steps, on however many devices."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

from core.errors import WorkerLostError
from engine.plan import StepPlan, StepResult

if TYPE_CHECKING:  # scheduling needs no torch; only who builds an executor does
    from engine.kv.pool import KVPool
    from engine.models.config import ModelConfig


class ExecutorLostError(WorkerLostError):
    """A step failed, and so will every further one: the executor has lost a part of itself."""


class OtherRanks(Protocol):
    """Ranks 1 and up, as who shares their processes with the engine reaches them. One thread."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def send(self, message: bytes) -> None:
        """Send to each of them.

        Raises:
            ExecutorLostError: one of them does not take it, or is lost.
        """
        ...

    def receive(self, timeout_s: float = 0.0) -> list[tuple[int, bytes]]:
        """(rank, message) of all that came; waits at most `timeout_s` for the first.

        Raises:
            ExecutorLostError: a rank is lost.
        """
        ...

    def fail(self, reason: str) -> NoReturn:
        """Give the ranks up, and with them the executor.

        Raises:
            ExecutorLostError: always.
        """
        ...


class PendingStep(Protocol):
    """A step under way."""

    def wait(self) -> StepResult:
        """Block until the step has been computed and its tokens are known. Called once.

        Raises:
            ExecutorLostError: the step failed, and the executor can serve no further one.
            Exception: the step failed; the executor may serve further steps.
        """
        ...


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A PendingStep that was computed while it was submitted."""

    result: StepResult

    def wait(self) -> StepResult:
        """See PendingStep."""
        return self.result


class Executor(Protocol):
    """Executes steps in the order of their submission. One thread calls it."""

    @property
    def model_config(self) -> "ModelConfig":
        """What is served."""
        ...

    @property
    def model_digest(self) -> bytes:
        """16 bytes that identify configuration and weights; see core.modelfile.digest."""
        ...

    @property
    def pool(self) -> "KVPool":
        """Memory of the KV blocks that plans speak of. With several ranks: this process's."""
        ...

    @property
    def ranks(self) -> OtherRanks | None:
        """The other ranks; None if this process computes alone."""
        ...

    @property
    def overlaps(self) -> bool:
        """True if `submit` returns before the step is computed, so that planning ahead pays."""
        ...

    def submit(self, plan: StepPlan) -> PendingStep:
        """Start a step. Everything needed of the plan is copied before this returns.

        If `overlaps`, one more step may be submitted before the one before it was waited for; its
        chunks may then say PENDING for the token that that step samples.

        Raises:
            ExecutorLostError: the executor can serve no further step.
            Exception: the step could not be started; nothing of it will run.
        """
        ...

    def close(self) -> None:
        """Free the device. Idempotent."""
        ...
