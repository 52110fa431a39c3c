"""The way of a step: planned, started, waited for, taken in and timed.

Owned by `Engine`. With an executor that overlaps, a step is started before the one ahead of it is
waited for. Invariant: what the executor raises ends the sequences of its step, and nothing else.
"""

import logging

from core.clock import Clock
from core.errors import DiptychError
from engine.in_flight import StepsInFlight
from engine.metrics import EngineMetrics
from engine.plan import StepResult
from engine.rates import StepRates
from engine.request import StepOutputs
from engine.scheduler import Scheduler
from engine.sequences import Sequences


class StepCycle:
    """Starts steps and lands them, in order."""

    def __init__(
        self,
        scheduler: Scheduler,
        in_flight: StepsInFlight,
        sequences: Sequences,
        *,
        rates: StepRates,
        metrics: EngineMetrics | None,
        clock: Clock,
    ) -> None:
        """Args: `sequences` hears who has ended, `rates` and `metrics` of every step."""
        self._scheduler = scheduler
        self._in_flight = in_flight
        self._sequences = sequences
        self._rates = rates
        self._metrics = metrics
        self._clock = clock
        self._log = logging.getLogger(__name__)
        self._last_end = clock()

    def launch(self) -> bool:
        """Plan a step and start it; False if there is no room for one, or nothing to do."""
        if not self._in_flight.has_room:
            return False
        started_at = self._clock()
        step = self._scheduler.schedule(ahead=bool(self._in_flight))
        if step is None:
            return False
        self._in_flight.submit(step, started_at)
        return True

    def land(self) -> StepOutputs:
        """Wait for the oldest step in flight and take in what it did."""
        finished = self._in_flight.wait()
        step, outcome = finished.step, finished.outcome
        if isinstance(outcome, StepResult):
            outputs, ended = self._scheduler.update(step, outcome)
        else:
            count = len(step.sequences)
            self._log.error("A step of %d sequences failed.", count, exc_info=outcome)
            outputs, ended = self._scheduler.fail(step, _typed(outcome))
        for sequence in ended:
            self._sequences.end(sequence)
        self._sequences.free_left()
        # A step that was started while another one ran began when that one ended.
        began_at, self._last_end = max(finished.started_at, self._last_end), self._clock()
        duration_s = self._last_end - began_at
        self._rates.observe(step.num_prefill_tokens, step.num_decode_tokens, duration_s)
        done = StepOutputs(outputs, step.num_prefill_tokens, step.num_decode_tokens, duration_s)
        if self._metrics is not None:
            self._metrics.observe_step(done)
        return done


def _typed(error: Exception) -> DiptychError:
    if isinstance(error, DiptychError):
        return error
    return DiptychError(f"The engine failed to execute a step: {type(error).__name__}: {error}")
