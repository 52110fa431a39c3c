"""One hand-over to decode: what is known of it, and what that allows.

Owned by `handover.py` and its book. Invariant: a READ starts only into reserved blocks, from blocks
that prefill reported, under a lease that holds and, but for a test, over a link that is proven;
`complete_at` is true only when all that must have come has come, under a lease that held from
before the first READ until then.
"""

from dataclasses import dataclass, field

from kvtransfer.actions import Deliver, StartRead
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.messages import Commit, Key, Offer, Progress
from kvtransfer.peer_link import PeerLink


@dataclass(frozen=True, slots=True)
class PendingRead:
    """A READ that was started and has not ended."""

    number: int
    num_blocks: int
    started_at: float


@dataclass(slots=True)
class Handover:
    """Where one hand-over stands."""

    key: Key
    link: PeerLink
    num_tokens: int
    num_blocks: int
    deadline: float
    claimed: bool = False
    lease_id: int | None = None
    remote: list[int] = field(default_factory=list)
    """Prefill's ids of the blocks complete so far."""
    reserve_asked: bool = False
    table: tuple[int, ...] | None = None
    num_cached: int = 0
    next_block: int = 0
    """Index of the first block not asked for yet."""
    read: PendingRead | None = None
    first_read_at: float = float("inf")
    last_read_at: float = 0.0
    commit: Commit | None = None
    committed_at: float = 0.0
    ended: bool = False
    probe: bool = False
    """It tests or measures the link: its blocks belong to no prompt."""
    enough: bool = False
    """The latest READ took long enough for a probe to end with it."""

    def doubt_of_offer(self, offer: Offer) -> str | None:
        """What is wrong with an Offer; None if it can be trusted."""
        if self.lease_id is None and offer.num_tokens == self.num_tokens:
            return None
        return f"{offer.num_tokens} tokens are offered, {self.num_tokens} expected, and once"

    def doubt_of_progress(self, progress: Progress) -> str | None:
        """The same of blocks that are reported."""
        end = progress.first_block + len(progress.block_ids)
        assert self.link.hello is not None
        in_pool = all(0 <= block < self.link.hello.num_blocks for block in progress.block_ids)
        if progress.first_block == len(self.remote) and end <= self.num_blocks and in_pool:
            return None
        return (
            f"blocks [{progress.first_block}, {end}) of {self.num_blocks} do not follow "
            f"the {len(self.remote)} known ones, or are outside the peer's pool"
        )

    def doubt_of_commit(self, commit: Commit, model_digest: bytes) -> str | None:
        """The same of a Commit."""
        wrong = [
            what
            for what, right in (
                ("a second Commit", self.commit is None),
                ("another model digest", commit.model_digest == model_digest),
                ("another epoch", commit.epoch == self.link.epoch),
                ("another number of tokens", commit.num_tokens == self.num_tokens),
                ("blocks missing", len(self.remote) == self.num_blocks),
            )
            if not right
        ]
        return f"its Commit does not fit: {', '.join(wrong)}" if wrong else None

    def start_read(self, number: int, now: float, config: HandoverConfig) -> StartRead | None:
        """Start the READ of all blocks that may be read now; None if there are none."""
        link, table, start = self.link, self.table, self.next_block
        # A probe's READs move 1, 1, 2, 4 and so on.
        most = max(1, start) if self.probe else self.num_blocks
        room = config.max_inflight_blocks - link.inflight_blocks
        count = min(room, len(self.remote) - start, most)
        if table is None or self.ended or self.read is not None or count <= 0:
            return None
        holds = link.holds_since(min(now, self.first_read_at), now + config.read_margin_s)
        if not holds or not (link.proven or self.probe):
            return None
        self.read = PendingRead(number, count, now)
        self.first_read_at = min(self.first_read_at, now)
        self.next_block += count
        link.inflight_blocks += count
        link.serve_last(self.key)
        stop = start + count
        pairs = tuple(zip(self.remote[start:stop], table[start:stop], strict=True))
        return StartRead(self.key, number, link.peer_id, pairs, self.probe and not start)

    def end_read(self, number: int) -> bool:
        """A READ has ended, one way or the other; False if it is not the pending one."""
        if self.read is None or self.read.number != number:
            return False
        self.link.inflight_blocks -= self.read.num_blocks
        self.read = None
        return True

    def complete_at(self, now: float) -> bool:
        """True if it may be delivered now; of a probe, if it has shown what it was to show."""
        read_all = self.next_block == self.num_blocks
        complete = self.table is not None and (read_all or (self.probe and self.enough))
        if self.commit is None or not complete or self.read is not None or self.ended:
            return False
        return self.link.holds_since(min(now, self.first_read_at), now)

    def delivery(self) -> Deliver:
        """What a complete one comes to."""
        assert self.commit is not None
        return Deliver(
            key=self.key,
            first_token=self.commit.first_token,
            logprobs=self.commit.logprobs,
            prefill_cached_tokens=self.commit.cached_tokens,
            num_read_blocks=self.num_blocks - self.num_cached,
            transfer_s=max(0.0, self.last_read_at - self.committed_at),
        )
