"""Keeps what placement needs between requests, and makes each choice in one synchronous call.

Called by dispatch on its event loop: worker events in, placements out. Invariant: what a placement
adds to a worker's load and cache is counted before the next placement looks.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from router.fleet.worker import CacheChange, WorkerInfo, WorkerLoad
from router.placement.choose import Demand, choose
from router.placement.cost import CostSettings, Prompt, WorkerView
from router.placement.decision import Placement, Refusal
from router.placement.prefix_index import Applied, PrefixIndex

TRANSIT_S = 0.02
"""Time that a message between router and worker may be on its way, in seconds.

A request counts as in a load report if it was sent this long before the report was taken.
"""


@dataclass(frozen=True, slots=True)
class _Sent:
    at: float
    tokens: int
    requests: int
    blocks: int


@dataclass(slots=True)
class _Member:
    info: WorkerInfo
    load: WorkerLoad = field(default_factory=WorkerLoad)
    sent: deque[_Sent] = field(default_factory=deque)
    placed: int = 0

    def view(self, key: str) -> WorkerView:
        return WorkerView(
            key=key,
            info=self.info,
            load=self.load,
            sent_tokens=sum(each.tokens for each in self.sent),
            sent_requests=sum(each.requests for each in self.sent),
            sent_blocks=sum(each.blocks for each in self.sent),
            placed=self.placed,
        )


class Placer:
    """Attached workers as placement sees them. Owned by one event loop."""

    def __init__(
        self,
        settings: CostSettings,
        *,
        local_prefill_max_tokens: int = 0,
        prediction_ttl_s: float = 30.0,
    ) -> None:
        self._settings = settings
        self._local_prefill_max_tokens = local_prefill_max_tokens
        self._index = PrefixIndex(prediction_ttl_s=prediction_ttl_s)
        self._members: dict[str, _Member] = {}

    @property
    def indexed_blocks(self) -> int:
        """Distinct blocks that some worker has or is about to have."""
        return len(self._index)

    def add(self, worker: str, info: WorkerInfo) -> None:
        """A worker attached."""
        self._members[worker] = _Member(info)
        self._index.add(worker, info.epoch)

    def drop(self, worker: str) -> None:
        """A worker is gone, and its cache with it."""
        self._members.pop(worker, None)
        self._index.drop(worker)

    def report(self, worker: str, load: WorkerLoad, now: float) -> None:
        """A load report arrived; what it already includes is not counted twice."""
        member = self._members.get(worker)
        if member is None:
            return
        member.load = load
        taken_at = now - load.heartbeat_age_s - TRANSIT_S
        while member.sent and member.sent[0].at < taken_at:
            member.sent.popleft()

    def apply(self, worker: str, change: CacheChange) -> Applied:
        """A cache event arrived."""
        return self._index.apply(worker, change)

    def place(
        self,
        prompt: Prompt,
        hashes_for: Callable[[WorkerInfo], Sequence[bytes]],
        now: float,
        *,
        avoid: Collection[str] = (),
        allow_avoided: bool = False,
        model_digest: bytes | None = None,
        absent: Sequence[Refusal] = (),
    ) -> Placement:
        """Choose, and count the choice at once.

        Args:
            prompt: what is to be placed.
            hashes_for: block hashes of the prompt under a worker's digest and block size.
            now: monotonic seconds, the clock of `report`.
            avoid: workers that failed this request.
            allow_avoided: take one of them if there is no other.
            model_digest: only workers with this digest.
            absent: workers that are known but not attached, with the reason.

        Raises:
            UnavailableError: no worker can take it; the message says why each was refused.
        """
        self._index.expire(now)
        demand = Demand(
            prompt=prompt,
            matched_blocks=self._match(hashes_for),
            avoid=avoid,
            allow_avoided=allow_avoided,
            model_digest=model_digest,
        )
        placement = choose(
            [member.view(key) for key, member in self._members.items()],
            demand,
            self._settings,
            local_prefill_max_tokens=self._local_prefill_max_tokens,
            absent=absent,
        )
        computes = placement.prefill or placement.worker
        for worker in {computes, placement.worker}:
            member = self._members[worker]
            member.placed += 1
            block_size = member.info.layout.block_size
            member.sent.append(
                _Sent(
                    now,
                    prompt.num_tokens - placement.cached_tokens if worker == computes else 0,
                    int(worker == placement.worker),
                    -(-prompt.num_tokens // block_size),
                )
            )
            self._index.predict(worker, hashes_for(member.info), now)
        return placement

    def _match(self, hashes_for: Callable[[WorkerInfo], Sequence[bytes]]) -> dict[str, int]:
        kinds = {
            (member.info.model_digest, member.info.layout.block_size): member.info
            for member in self._members.values()
        }
        matched: dict[str, int] = {}
        for info in kinds.values():
            # Chains of different digests or block sizes share no hash.
            matched |= self._index.match(hashes_for(info))
        return matched
