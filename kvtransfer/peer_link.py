"""Decode's view of one link to a prefill worker: is the peer alive, and until when do leases hold.

Owned by `handover_book.py`, fed by `handover.py`. Invariant: `valid_until` lies before the moment
at which prefill may end any lease of this link that it has not revoked, as long as the two clocks
run at rates that differ by less than the drift ratio. It counts from when decode sent the Renew
that prefill acknowledged, and prefill counts from when it received it, which is later.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvtransfer.handover_config import HandoverConfig
from kvtransfer.messages import Hello, Key, hello_mismatch

RENEWS_PER_TTL = 5
"""Heartbeats per lease ttl: several may be lost or late before a lease lapses."""
RENEWS_PER_SILENCE = 2
"""And enough of them to notice a frozen peer in time."""
MAX_UNACKNOWLEDGED = 64


@dataclass(slots=True)
class PeerLink:
    """One link, from its opening until it closes."""

    number: int
    worker_id: str
    epoch: int
    address: str
    opened_at: float
    drift_ratio: float
    hello: Hello | None = None
    """None while opening."""
    keys: dict[Key, None] = field(default_factory=dict)
    """Hand-overs on this link, next to be served first."""
    leases: dict[int, Key] = field(default_factory=dict)
    inflight_blocks: int = 0
    probe: Key | None = None
    """The one under way; it is among `keys` as well."""
    proven: bool = True
    """A test block has come over it as it was sent, or none need or could be had."""
    idle_since: float = 0.0
    valid_since: float = float("inf")
    valid_until: float = float("-inf")
    _just_proven: bool = False
    _sent: OrderedDict[int, float] = field(default_factory=OrderedDict)
    _next_seq: int = 1
    _renewed_at: float = float("-inf")

    @property
    def peer_id(self) -> str:
        """Name of the peer's pool for the transport; a new link gets a new one."""
        return f"{self.worker_id}/{self.epoch:x}/{self.number}"

    @property
    def ttl_s(self) -> float:
        """Lease ttl of the peer, 0 while opening."""
        return self.hello.lease_ttl_s if self.hello else 0.0

    def serve_last(self, key: Key) -> None:
        """Let all others on this link go first next time."""
        self.keys[key] = self.keys.pop(key)

    def hello_fault(self, own: Hello, hello: Hello, config: HandoverConfig) -> str:
        """Why a hello can't be the one expected on this link; empty if it can."""
        if self.hello is not None:
            return f"{self.worker_id} sent a second hello."
        if (hello.worker_id, hello.epoch) != (self.worker_id, self.epoch):
            return (
                f"{self.address} is {hello.worker_id} of epoch {hello.epoch:x}, expected was "
                f"{self.worker_id} of epoch {self.epoch:x}."
            )
        if hello.lease_ttl_s * (1 - self.drift_ratio) <= config.read_margin_s:
            return f"A lease ttl of {hello.lease_ttl_s:g} s is too short to read anything."
        return hello_mismatch(own, hello)

    def prove(self) -> None:
        """From here on KV may be read over it."""
        self.proven = self._just_proven = True

    def take_proof(self) -> bool:
        """True once after `prove`: READs may have waited for it."""
        taken, self._just_proven = self._just_proven, False
        return taken

    def renew_due(self, now: float, peer_silence_s: float) -> bool:
        """True if a Renew must be sent now."""
        interval_s = min(self.ttl_s / RENEWS_PER_TTL, peer_silence_s / RENEWS_PER_SILENCE)
        return self.hello is not None and now >= self._renewed_at + interval_s

    def next_renew(self, now: float) -> int:
        """Number of a Renew that is sent not before `now`."""
        seq = self._next_seq
        self._next_seq += 1
        self._renewed_at = now
        if len(self._sent) < MAX_UNACKNOWLEDGED:
            self._sent[seq] = now
        return seq

    def renewed(self, seq: int) -> bool:
        """Take prefill's acknowledgement; False if it answers nothing that is still open."""
        sent_at = self._sent.get(seq)
        if sent_at is None:
            return False
        while self._sent and next(iter(self._sent)) <= seq:
            self._sent.popitem(last=False)
        if sent_at > self.valid_until:
            self.valid_since = sent_at
        self.valid_until = max(self.valid_until, sent_at + self.ttl_s * (1 - self.drift_ratio))
        return True

    def silent_since(self, now: float) -> float:
        """When the oldest unanswered Renew was sent; `now` if all were answered."""
        return next(iter(self._sent.values()), now)

    def holds_since(self, start: float, now: float) -> bool:
        """True if every lease not revoked held from `start` until `now`, without a gap."""
        return self.valid_since <= start and now < self.valid_until
