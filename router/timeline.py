"""Where a request's time went and why it went to which worker.

Dispatch notes moments on the router's clock as they happen; the stage ledger is worked out when
somebody asks. Between two moments the workers' own durations are laid out first and what is left is
the way between the processes:

    received .. tokenized       tokenize
    tokenized .. admitted       queue, if its turn did not come at once
    admitted .. placed          route, or reroute after a failed attempt; includes waiting
    placed .. first token       prefill_queue, prefill, prefill_rpc
    first .. second token       transfer, decode_queue, first_decode, handover_rpc (of two workers)
    .. last word of the worker  decode
    .. client has it all        deliver

An attempt that failed is one stage, failed_attempt. Where a worker's durations are missing, the
interval is called first_token or handover and counts as unattributed.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from core.clock import Clock
from core.errors import DiptychError
from router.fleet.worker import LegEnd, StageTimes
from router.generation import GenerationEnd, GenerationRequest
from router.ledger import Failure
from router.placement.decision import MAX_CANDIDATES, Mode, Placement
from telemetry.ledger import StageLedger

STAGES = (
    *("tokenize", "queue", "route", "prefill_queue", "prefill", "prefill_rpc"),
    *("transfer", "decode_queue", "first_decode", "handover_rpc", "decode", "deliver"),
    *("reroute", "failed_attempt", "first_token", "handover", "unfinished"),
)
"""Every stage: those of a request that goes well, in order of time, then those of others."""
STAGES_TO_FIRST_TOKEN = STAGES[: STAGES.index("prefill_rpc") + 1]
"""Stages of a request that goes well which its time to first token is made of."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """When one stage of a request was, on the router's clock."""

    name: str
    attempt: int
    """0: of none."""
    began_at: float
    ended_at: float


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt of a request: where it went, and what came of it."""

    number: int
    placement: Placement
    worker_ids: Mapping[str, str]
    placed_at: float
    num_tokens: int = 0
    first_token_at: float | None = None
    second_token_at: float | None = None
    failed_at: float | None = None
    failure: Failure | None = None
    prefill_times: StageTimes | None = None
    decode_times: StageTimes | None = None
    cached_tokens: int | None = None
    kv_bytes: int = 0

    def account(self, ledger: StageLedger, until: float) -> None:
        """Add this attempt's stages, from where it was placed to where it ended or stands."""
        if self.failed_at is not None:
            ledger.advance(self.failed_at, "failed_attempt", attempt=self.number)
            return
        if self.first_token_at is None:
            ledger.advance(until, "unfinished", attempt=self.number)
            return
        times = self.prefill_times
        if times is None:
            ledger.advance(self.first_token_at, "first_token", attempt=self.number, known=False)
        else:
            parts = {"prefill_queue": times.queue_s, "prefill": times.prefill_s}
            ledger.advance(self.first_token_at, "prefill_rpc", parts=parts, attempt=self.number)
        if self.placement.mode is Mode.DISAGGREGATED and self.second_token_at is not None:
            times = self.decode_times
            if times is None:
                ledger.advance(self.second_token_at, "handover", attempt=self.number, known=False)
            else:
                parts = {
                    "transfer": times.transfer_s,
                    "decode_queue": times.decode_queue_s,
                    "first_decode": times.first_decode_s,
                }
                ledger.advance(
                    self.second_token_at, "handover_rpc", parts=parts, attempt=self.number
                )
        ledger.advance(until, "decode", attempt=self.number)

    def as_dict(self, zero: float) -> dict[str, object]:
        """For JSON; moments are seconds after `zero`."""
        return {
            "attempt": self.number,
            "placed_at_s": _round(self.placed_at - zero),
            "workers": dict(self.worker_ids),
            "output_tokens": self.num_tokens,
            "cached_tokens": self.cached_tokens,
            "kv_bytes": self.kv_bytes,
            "failure": None
            if self.failure is None
            else {
                "code": self.failure.code.value,
                "message": self.failure.message,
                "stuck_in": self.failure.stage or None,
            },
            "decision": self.placement.as_dict(),
        }


@dataclass(slots=True, kw_only=True)
class RequestTimeline:
    """Moments of one request. Owned by dispatch, which alone changes it."""

    request: GenerationRequest
    clock: Clock
    attempts: list[Attempt] = field(default_factory=list)
    admitted_at: float | None = None
    queued: bool = False
    """Its turn did not come at once."""
    first_token_at: float | None = None
    ended_at: float | None = None
    closed_at: float | None = None
    outcome: str = "running"
    error: DiptychError | None = None
    num_tokens: int = 0
    cached_tokens: int = 0

    def admitted(self) -> None:
        """Its turn in the queue came."""
        self.admitted_at = self.clock()

    def placed(self, number: int, placement: Placement, worker_ids: Mapping[str, str]) -> None:
        """An attempt was sent to its workers."""
        self.attempts.append(
            Attempt(
                number=number,
                placement=placement,
                worker_ids=worker_ids,
                placed_at=self.clock(),
            )
        )

    def tokens(self, count: int) -> None:
        """The latest attempt gave `count` new tokens."""
        attempt = self.attempts[-1]
        attempt.num_tokens += count
        self.num_tokens += count
        if attempt.second_token_at is None:
            now = self.clock()
            if attempt.first_token_at is None:
                attempt.first_token_at = now
            if attempt.num_tokens > 1:
                attempt.second_token_at = now
            if self.first_token_at is None:
                self.first_token_at = now

    def leg_ended(self, worker: str, end: LegEnd) -> None:
        """A worker said its last word, perhaps after the request had ended."""
        for attempt in self.attempts:
            placement = attempt.placement
            if attempt.number != end.attempt:
                continue
            if worker == (placement.prefill or placement.worker):
                attempt.prefill_times = end.times
                attempt.cached_tokens = end.cached_tokens
            elif worker == placement.worker:
                attempt.decode_times = end.times
                attempt.kv_bytes = end.kv_bytes

    def attempt_failed(self, failure: Failure) -> None:
        """The latest attempt is over."""
        self.attempts[-1].failed_at = self.clock()
        self.attempts[-1].failure = failure

    def ended(self, end: GenerationEnd | None, error: DiptychError | None) -> None:
        """No more tokens will come. Neither `end` nor `error`: the client went away."""
        self.ended_at = self.clock()
        self.error = error
        if end is not None:
            self.outcome = end.finish_reason.value
            self.cached_tokens = end.cached_tokens
        else:
            self.outcome = error.code.value if error is not None else "cancelled"

    def closed(self) -> None:
        """The client has all of it, or is gone."""
        self.closed_at = self.clock()

    @property
    def running_s(self) -> float:
        """Seconds since it was let out of the queue."""
        return 0.0 if self.admitted_at is None else self.clock() - self.admitted_at

    @property
    def ledger(self) -> StageLedger:
        """Stages from receipt until the end, or until now."""
        now = self.clock() if self.closed_at is None else self.closed_at
        until = now if self.ended_at is None else self.ended_at
        ledger = StageLedger(self.request.received_at)
        ledger.advance(self.request.tokenized_at, "tokenize")
        if self.queued:
            ledger.advance(until if self.admitted_at is None else self.admitted_at, "queue")
        route = "route"
        for attempt in self.attempts:
            ledger.advance(attempt.placed_at, route, attempt=attempt.number)
            attempt.account(ledger, until)
            route = "reroute"
        if not self.attempts or self.attempts[-1].failed_at is not None:
            ledger.advance(until, route, attempt=len(self.attempts) + 1)
        if self.ended_at is not None:
            ledger.advance(now, "deliver")
        return ledger

    @property
    def mode(self) -> Mode | None:
        """How the latest attempt was placed; None if there was none."""
        return self.attempts[-1].placement.mode if self.attempts else None

    def placement(self, attempt: int) -> tuple[Placement, Mapping[str, str]] | None:
        """Where an attempt went, and the ids of its workers."""
        for each in self.attempts:
            if each.number == attempt:
                return each.placement, each.worker_ids
        return None

    @property
    def spans(self) -> list[StageSpan]:
        """The stages that took time, in order, on the router's clock."""
        found, began_at = [], self.request.received_at
        for stage in self.ledger.stages:
            ended_at = began_at + stage.seconds
            if stage.seconds:
                found.append(StageSpan(stage.name, stage.attempt, began_at, ended_at))
            began_at = ended_at
        return found

    def as_dict(self) -> dict[str, object]:
        """For JSON: durations in seconds, moments in seconds after receipt."""
        ledger = self.ledger
        zero = self.request.received_at
        return {
            "request_id": self.request.request_id,
            "trace_id": self.request.trace_id,
            "outcome": self.outcome,
            "error": None if self.error is None else self.error.message,
            "mode": None if self.mode is None else self.mode.value,
            "prompt_tokens": len(self.request.prompt_ids),
            "output_tokens": self.num_tokens,
            "cached_tokens": self.cached_tokens,
            "end_to_end_s": ledger.total_s,
            "ttft_s": None if self.first_token_at is None else self.first_token_at - zero,
            "stages": [
                {"name": stage.name, "attempt": stage.attempt or None, "seconds": stage.seconds}
                for stage in ledger.stages
            ],
            "unattributed_s": ledger.unattributed_s,
            "overrun_s": ledger.overrun_s,
            "attempts": [attempt.as_dict(zero) for attempt in self.attempts],
        }

    def cached_by_worker(self) -> list[tuple[str, int]]:
        """By attempt: worker that computed the prompt, and tokens that its cache spared."""
        return [
            (attempt.worker_ids.get("prefill", attempt.worker_ids["decode"]), attempt.cached_tokens)
            for attempt in self.attempts
            if attempt.cached_tokens is not None
        ]

    def summary(self) -> dict[str, object]:
        """The same request in one line of a list, without what costs work to account for."""
        until = self.closed_at if self.closed_at is not None else self.clock()
        zero = self.request.received_at
        return {
            "request_id": self.request.request_id,
            "outcome": self.outcome,
            "mode": self.attempts[-1].placement.mode.value if self.attempts else None,
            "attempts": len(self.attempts),
            "prompt_tokens": len(self.request.prompt_ids),
            "output_tokens": self.num_tokens,
            "cached_tokens": self.cached_tokens,
            "ttft_s": None if self.first_token_at is None else _round(self.first_token_at - zero),
            "end_to_end_s": _round(until - zero),
            "age_s": _round(self.clock() - zero),
        }

    def explanation(self) -> dict[str, object]:
        """For JSON: each decision with all of its candidates that were kept."""
        admitted_at = self.admitted_at
        return {
            "request_id": self.request.request_id,
            "prompt_tokens": len(self.request.prompt_ids),
            "max_tokens": self.request.sampling.max_tokens,
            "priority": self.request.priority,
            "queued_s": _round((admitted_at or self.clock()) - self.request.tokenized_at),
            "decisions": [
                {
                    "attempt": attempt.number,
                    "at_s": _round(attempt.placed_at - self.request.received_at),
                    **attempt.placement.as_dict(MAX_CANDIDATES),
                    "actual_cached_tokens": attempt.cached_tokens,
                }
                for attempt in self.attempts
            ],
        }


class TimelineStore:
    """The latest timelines, oldest forgotten first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._timelines: OrderedDict[str, RequestTimeline] = OrderedDict()

    def add(self, timeline: RequestTimeline) -> None:
        """Keep a timeline, from its request's first moment on."""
        self._timelines[timeline.request.request_id] = timeline
        while len(self._timelines) > self._capacity:
            self._timelines.popitem(last=False)

    def get(self, request_id: str) -> RequestTimeline | None:
        """None if it is unknown or forgotten."""
        return self._timelines.get(request_id)

    def latest(self, count: int) -> list[RequestTimeline]:
        """At most `count`, newest first."""
        return list(islice(reversed(self._timelines.values()), count))


def _round(seconds: float) -> float:
    return round(seconds, 6)
