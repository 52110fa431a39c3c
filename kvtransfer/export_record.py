"""What prefill remembers of one export and of one link. Owned by `export_book.py`.

States of an export:
    PREFILLING  the engine computes; a Claim turns it into an offered lease
    COMMITTED   the prompt is complete
    REVOKED     there will be no Commit; only Release or expiry are awaited
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from kvtransfer.messages import Commit, Key, Offer, PrefillMessage, Progress


class ExportState(StrEnum):
    """See the module's docstring."""

    PREFILLING = "prefilling"
    COMMITTED = "committed"
    REVOKED = "revoked"


@dataclass(slots=True)
class ClaimLink:
    """One link of a decode worker, over which it claims prompts."""

    number: int
    worker_id: str | None = None
    """None until its hello."""
    closed: bool = False
    renewed_at: float = float("-inf")
    renew_seq: int = 0
    probe: Key | None = None
    """The latest one."""
    early_claims: dict[Key, float] = field(default_factory=dict)
    """Key to when it was claimed."""

    def renew(self, seq: int, now: float) -> bool:
        """Take a Renew; False if it is older than one that was taken."""
        if seq <= self.renew_seq:
            return False
        self.renew_seq = seq
        self.renewed_at = now
        return True


@dataclass(slots=True)
class Export:
    """One prompt, or the blocks of a probe, on the way to a decode worker."""

    key: Key
    decode_worker_id: str
    num_tokens: int
    router: int = 0
    blocks: list[int] = field(default_factory=list)
    state: ExportState = ExportState.PREFILLING
    settled_at: float = 0.0
    """When it left PREFILLING."""
    link: ClaimLink | None = None
    lease_id: int = 0
    offered_at: float = 0.0
    commit: Commit | None = None

    @property
    def prefilling(self) -> bool:
        """True while the engine is to compute it."""
        return self.state is ExportState.PREFILLING

    def offer(self, link: ClaimLink, lease_id: int, now: float) -> list[PrefillMessage]:
        """Lease it over a link. Returns what decode is to hear: all that is known by now."""
        self.link = link
        self.lease_id = lease_id
        self.offered_at = now
        messages: list[PrefillMessage] = [Offer(self.key, lease_id, self.num_tokens)]
        if self.blocks:
            messages.append(Progress(lease_id, 0, tuple(self.blocks)))
        if self.commit is not None:
            self.commit = replace(self.commit, lease_id=lease_id)
            messages.append(self.commit)
        return messages

    def complete(self, commit: Commit, now: float) -> None:
        """The prompt is complete."""
        self.state = ExportState.COMMITTED
        self.settled_at = now
        self.commit = commit

    def revoke(self, now: float) -> None:
        """There will be no Commit, or it is void."""
        self.state = ExportState.REVOKED
        self.settled_at = now

    def expires_at(self, ttl_s: float) -> float:
        """When its lease is over; before it is claimed, when it is given up."""
        if self.link is not None:
            return max(self.offered_at, self.link.renewed_at) + ttl_s
        return float("inf") if self.prefilling else self.settled_at + ttl_s

    def overdue_at(self, now: float, max_lease_s: float) -> bool:
        """True if decode keeps renewing what it should have read long ago."""
        if self.link is None or self.link.closed or self.prefilling:
            return False
        return self.settled_at + max_lease_s <= now
