"""What decode remembers of one hand-over. Owned and changed by `handover.py` alone."""

from dataclasses import dataclass, field

from kvtransfer.messages import Commit, Key
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
    """It measures the link: its blocks have no content, and nobody waits for them."""
    enough: bool = False
    """The latest READ took long enough for a probe to end with it."""

    @property
    def most_to_read(self) -> int:
        """Blocks that the next READ may move; a probe's READs move 1, 1, 2, 4 and so on."""
        return max(1, self.next_block) if self.probe else self.num_blocks

    def misfits(self, commit: Commit, model_digest: bytes) -> list[str]:
        """What is wrong with its Commit; empty if it can be trusted."""
        return [
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
