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
