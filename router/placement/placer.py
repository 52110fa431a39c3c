"""Keeps what placement needs between requests, and makes each choice in one synchronous call.

Called by dispatch on its event loop: worker events in, placements out. Invariant: what a placement
adds to a worker's load and cache is counted before the next placement looks.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from router.fleet.worker import CacheChange, Role, WorkerInfo, WorkerLoad
from router.placement.choose import choose, least_backlog_s
from router.placement.columns import WorkerColumns, WorkerView
from router.placement.cost import EXPECTED_OUTPUT_TOKENS, CostSettings, Prompt
from router.placement.decision import Placement, Refusal
from router.placement.prefix_index import Applied, PrefixIndex
from router.placement.prefix_walk import Held
from router.placement.prices import Demand, Distrust, Outlook
from router.placement.rate import RecentCount, RecentCounts

TRANSIT_S = 0.02
"""Time that a message between router and worker may be on its way, in seconds.

A request counts as in a load report if it was sent this long before the report was taken.
"""


RECENT_S = 10.0
"""Time over which arrivals and requests for a prefix are counted, in seconds."""
MAX_PREFIXES = 4096
"""Prefixes whose requests are counted."""
OUTPUT_WEIGHT = 0.02
"""Weight of the latest output in the mean length of outputs."""


@dataclass(frozen=True, slots=True)
class _Sent:
    at: float
    tokens: int
    requests: int
    blocks: int


@dataclass(slots=True)
class _Member:
    """A worker: what it said last and what it was sent since."""

    info: WorkerInfo
    load: WorkerLoad = field(default_factory=WorkerLoad)
    sent: deque[_Sent] = field(default_factory=deque)
    sent_requests: int = 0
    sent_blocks: int = 0
    idle_at: float = 0.0
    placed: int = 0

    def report(self, load: WorkerLoad, now: float, rate: float) -> None:
        self.load = load
        taken_at = now - load.heartbeat_age_s - TRANSIT_S
        while self.sent and self.sent[0].at < taken_at:
            known = self.sent.popleft()
            self.sent_requests -= known.requests
            self.sent_blocks -= known.blocks
        self.idle_at = now + load.backlog_tokens / rate
        for each in self.sent:
            self.idle_at += each.tokens / rate

    def send(self, sent: _Sent, rate: float) -> None:
        self.sent.append(sent)
        self.sent_requests += sent.requests
        self.sent_blocks += sent.blocks
        self.placed += 1
        self.idle_at = max(self.idle_at, sent.at) + sent.tokens / rate

    def view(self, key: str) -> WorkerView:
        return WorkerView(
            key=key,
            info=self.info,
            load=self.load,
            idle_at=self.idle_at,
            sent_requests=self.sent_requests,
            sent_blocks=self.sent_blocks,
            placed=self.placed,
        )


class Placer:
    """Attached workers as placement sees them. Owned by one event loop."""

    def __init__(
        self,
        settings: CostSettings,
        *,
        local_prefill_max_tokens: int = 0,
        prediction_ttl_s: float = 60.0,
    ) -> None:
        self._local_prefill_max_tokens = local_prefill_max_tokens
        self._index = PrefixIndex(prediction_ttl_s=prediction_ttl_s)
        self._columns = WorkerColumns(settings)
        self._members: dict[str, _Member] = {}
        self._kinds: dict[tuple[bytes, int], WorkerInfo] = {}
        self._num_computing = 1
        """Workers that prompts are spread over."""
        self._arrivals = RecentCount(RECENT_S)
        self._popularity = RecentCounts(RECENT_S, MAX_PREFIXES)
        self._output_tokens = EXPECTED_OUTPUT_TOKENS

    @property
    def index(self) -> PrefixIndex:
        """What is cached where."""
        return self._index

    @property
    def indexed_blocks(self) -> int:
        """Distinct blocks that some worker has or is about to have."""
        return len(self._index)

    def add(self, worker: str, info: WorkerInfo) -> None:
        """A worker attached."""
        self.drop(worker)
        self._members[worker] = _Member(info)
        self._index.add(worker, info.epoch)
        self._refresh(worker)
        self._note_kinds()

    def drop(self, worker: str) -> None:
        """A worker is gone, and its cache with it."""
        self._members.pop(worker, None)
        self._index.drop(worker)
        self._columns.drop(worker)
        self._note_kinds()

    def report(self, worker: str, load: WorkerLoad, now: float) -> None:
        """A load report arrived; what it already includes is not counted twice."""
        self._index.expire(now)  # so that a choice seldom has to
        member = self._members.get(worker)
        if member is not None:
            member.report(load, now, self._prefill_rate(load))
            self._refresh(worker)

    def apply(self, worker: str, change: CacheChange) -> Applied:
        """A cache event arrived."""
        return self._index.apply(worker, change)

    def generated(self, num_tokens: int) -> None:
        """A request ended well after so many tokens: what others may be expected to need."""
        self._output_tokens += OUTPUT_WEIGHT * (num_tokens - self._output_tokens)

    def least_backlog_s(self, now: float) -> float:
        """Seconds of prompts that the least busy of the ready workers has to compute."""
        return least_backlog_s(self._columns, now)

    def place(
        self,
        prompt: Prompt,
        hashes_for: Callable[[WorkerInfo], Sequence[bytes]],
        now: float,
        *,
        avoid: Collection[str] = (),
        allow_avoided: bool = False,
        distrust: Distrust | None = None,
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
            distrust: who fails of late.
            model_digest: only workers with this digest.
            absent: workers that are known but not attached, with the reason.

        Raises:
            UnavailableError: no worker can take it; the message says why each was refused.
        """
        self._index.expire(now)
        matched, longest = self._match(hashes_for)
        demand = Demand(
            prompt=prompt,
            held={} if prompt.recomputed else matched,
            popularity=self._popularity.add(longest, now) if longest else 0.0,
            avoid=avoid,
            allow_avoided=allow_avoided,
            distrust=distrust or Distrust(),
            model_digest=model_digest,
        )
        placement = choose(self._columns, demand, self._outlook(now), absent=absent)
        self._arrivals.add(now)
        computes = placement.prefill or placement.worker
        chosen = {computes, placement.worker}
        for worker in chosen:
            member = self._members[worker]
            tokens = prompt.num_tokens - placement.cached_tokens if worker == computes else 0
            blocks = -(-prompt.num_tokens // member.info.layout.block_size)
            sent = _Sent(now, tokens, int(worker == placement.worker), blocks)
            member.send(sent, self._prefill_rate(member.load))
            self._refresh(worker)
        # Two workers that are a pair count blocks alike.
        self._index.predict(chosen, hashes_for(self._members[computes].info), now)
        return placement

    def _prefill_rate(self, load: WorkerLoad) -> float:
        return load.prefill_tokens_per_s or self._columns.typical_prefill_rate

    def _outlook(self, now: float) -> Outlook:
        return Outlook(
            now=now,
            output_tokens=self._output_tokens,
            arrivals_per_s=self._arrivals.per_s(now) / self._num_computing,
            local_prefill_max_tokens=self._local_prefill_max_tokens,
        )

    def _refresh(self, worker: str) -> None:
        self._columns.put(self._members[worker].view(worker))

    def _note_kinds(self) -> None:
        prefill = sum(member.info.role is Role.PREFILL for member in self._members.values())
        self._num_computing = max(1, prefill or len(self._members))
        self._kinds = {
            (member.info.model_digest, member.info.layout.block_size): member.info
            for member in self._members.values()
        }

    def _match(
        self, hashes_for: Callable[[WorkerInfo], Sequence[bytes]]
    ) -> tuple[dict[str, Held], bytes]:
        """What each worker has of the prompt, and the last block that any of them has."""
        matched: dict[str, Held] = {}
        last = b""
        for info in self._kinds.values():
            # Chains of different digests or block sizes share no hash.
            hashes = hashes_for(info)
            found = self._index.match(hashes)
            if found:
                matched |= found
                last = hashes[max(held.blocks for held in found.values()) - 1]
        return matched, last
