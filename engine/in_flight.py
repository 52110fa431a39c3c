"""The steps that an executor has been given and that nobody has waited for yet, oldest first.

Owned by `Engine`. An executor that overlaps may have two at once, and one between two calls of
`Engine.step`; any other has one at most, and none between calls. Invariant: every step that was
submitted is waited for once, in order, whatever it raised and whatever interrupted it.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import DiptychError
from engine.draft import ScheduledStep
from engine.executor import Executor, PendingStep
from engine.plan import StepResult
from engine.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that was waited for."""

    step: ScheduledStep
    outcome: StepResult | Exception
    started_at: float


@dataclass(frozen=True, slots=True)
class _NotComputed:
    """A PendingStep that the executor refused, or that an interrupt cut off."""

    error: Exception

    def wait(self) -> StepResult:
        raise self.error


@dataclass(slots=True)
class _InFlight:
    step: ScheduledStep
    pending: PendingStep
    started_at: float
    outcome: StepResult | Exception | None = None
    """None until somebody has waited for it."""

    def settle(self) -> StepResult | Exception:
        if self.outcome is None:
            try:
                self.outcome = self.pending.wait()
            except Exception as error:
                self.outcome = error
            except BaseException:
                self.pending = _NotComputed(_interrupted())
                raise
        return self.outcome


class StepsInFlight:
    """Submits steps and waits for them."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._most = 2 if executor.overlaps else 1
        self._steps: deque[_InFlight] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[ScheduledStep]:
        return (in_flight.step for in_flight in self._steps)

    @property
    def has_room(self) -> bool:
        """True if a step may be submitted now.

        Not after one that could not be started: its sequences end when it is waited for.
        """
        steps = self._steps
        return not steps or (
            len(steps) < self._most and not isinstance(steps[-1].pending, _NotComputed)
        )

    def submit(self, step: ScheduledStep, started_at: float) -> None:
        """Start a step. What the executor raises is kept for when the step is waited for."""
        pending: PendingStep = _NotComputed(_interrupted())
        try:
            pending = self._executor.submit(step.plan)
        except Exception as error:
            pending = _NotComputed(error)
        finally:
            self._steps.append(_InFlight(step, pending, started_at))

    def wait(self) -> FinishedStep:
        """Wait for the oldest step."""
        oldest = self._steps[0]
        outcome = oldest.settle()
        self._steps.popleft()
        return FinishedStep(oldest.step, outcome, oldest.started_at)

    def token_of(self, sequence: SequenceState) -> int | None:
        """The token that the newest step samples for a sequence, waited for; None if it failed.

        The step stays in flight: whoever waits for it later gets the same result.
        """
        newest = self._steps[-1]
        outcome = newest.settle()
        if not isinstance(outcome, StepResult):
            return None
        token_id = outcome.token_ids[newest.step.sequences.index(sequence)]
        assert token_id is not None, "the token is not pending in the newest step"
        return token_id


def _interrupted() -> DiptychError:
    return DiptychError("The step was interrupted.")
