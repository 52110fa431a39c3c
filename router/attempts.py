"""Starts attempts of runs: chooses the workers of each, and tells them their parts.

Called by the lifecycle of runs, which decides when; the placer decides where, the run makes the
messages. Invariant: what is told to the ledger as placed was sent to every leg, or the effects say
whose part could not be.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from core.clock import Clock
from router.fleet.breakers import Breakers
from router.fleet.worker import Role, WorkerInfo, WorkerState
from router.ledger import Effects, Leg
from router.metrics import FleetMetrics
from router.placement.decision import Placement, Refusal
from router.placement.placer import Placer
from router.run import Run
from rpc.v1 import worker_pb2


class Workers(Protocol):
    """What dispatch needs of the fleet."""

    def send(self, worker: str, message: worker_pb2.RouterMessage) -> bool:
        """Queue a message; False if the worker can't be reached."""

    def info(self, worker: str) -> WorkerInfo | None:
        """None while the worker is not attached."""

    @property
    def absent(self) -> Mapping[str, str]:
        """Workers that are not attached, and why."""

    @property
    def shortage(self) -> str:
        """Why there may be none, as a sentence."""

    @property
    def census(self) -> Iterable[tuple[Role, WorkerState]]:
        """Role and state of every known worker."""


class Attempts:
    """See the module."""

    def __init__(
        self,
        workers: Workers,
        placer: Placer,
        metrics: FleetMetrics,
        clock: Clock,
        breakers: Breakers,
    ) -> None:
        self._workers = workers
        self._placer = placer
        self._metrics = metrics
        self._clock = clock
        self._breakers = breakers
        self.takers: set[str] = set()
        """Workers that take requests."""

    def choose(self, run: Run, sibling: Run | None, now: float) -> Placement:
        """Where its next attempt goes.

        Args:
            run: waits to be placed.
            sibling: another run of the same prompt that was asked for first, if there is one.
            now: monotonic seconds.

        Raises:
            UnavailableError: no worker can take it now.
        """
        try:
            return self._placer.place(
                run.prompt,
                run.hashes_for,
                now,
                avoid=run.ledger.avoid | self._apart_from(sibling, run),
                allow_avoided=now >= run.retry_at,
                distrust=self._breakers.distrust(),
                model_digest=run.model_digest if run.ledger.emitted else None,
                absent=[
                    Refusal((worker,), cause) for worker, cause in self._workers.absent.items()
                ],
            )
        finally:
            self._metrics.decision.observe(self._clock() - now)

    def start(self, run: Run, placement: Placement) -> Effects:
        """Place a waiting run and tell its workers; the effects of one that can't be told."""
        info = self._workers.info(placement.worker)
        peer = self._workers.info(placement.prefill) if placement.prefill is not None else None
        assert info is not None
        worker_ids = {"decode": info.worker_id} | ({"prefill": peer.worker_id} if peer else {})
        messages = run.messages(placement, info, peer, self._clock())
        run.model_digest = info.model_digest
        run.prompt_worker = placement.prefill
        run.ledger.place(messages, mode=placement.mode.value)
        run.timeline.placed(run.ledger.attempt, placement, worker_ids)
        self._breakers.placed(placement)
        self._metrics.routing.labels(placement.mode.value).inc()
        self._metrics.prefix_match.observe(placement.cached_tokens / run.prompt.num_tokens)
        run.wake()
        for leg, message in messages.items():
            if not self._workers.send(leg.worker, message):
                return run.ledger.lost(leg.worker, "it takes no messages")
        return Effects()

    def abort(self, run: Run, legs: Sequence[Leg]) -> None:
        """Tell the workers of these legs to stop."""
        for leg in legs:
            abort = worker_pb2.Abort(request_id=run.request.request_id, attempt=leg.attempt)
            self._workers.send(leg.worker, worker_pb2.RouterMessage(abort=abort))

    def _apart_from(self, sibling: Run | None, run: Run) -> set[str]:
        """Workers that would compute again what one computes for a sequence of the same prompt.

        Both would be as fast, so cost alone does not keep the sequences together. Only for the
        first attempt: after a failure any worker is welcome.
        """
        chosen = sibling.prompt_worker if sibling is not None and not run.ledger.attempt else None
        if chosen not in self.takers:
            return set()
        roles = {
            worker: info.role for worker in self.takers if (info := self._workers.info(worker))
        }
        return {w for w, role in roles.items() if w != chosen and role == roles.get(chosen)}
