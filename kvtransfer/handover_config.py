"""What bounds the decode side of the hand-over. Read by `handover.py`, made by decode."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverConfig:
    """Bounds of the decode side. All times in seconds."""

    drift_ratio: float = 0.05
    """By how much the clocks of two hosts may differ in rate, as a share of the lease ttl."""
    read_margin_s: float = 0.5
    """Least time that a lease must still hold for a READ to start."""
    peer_silence_s: float = 10.0
    """A link whose Renew is unanswered for this long is dead. Prefill's longest step is shorter."""
    open_timeout_s: float = 5.0
    """A link without a hello for this long is dead."""
    read_timeout_s: float = 10.0
    """A READ that takes longer is stuck, and with it the peer."""
    idle_link_s: float = 60.0
    """A link without a hand-over for this long is closed."""
    max_inflight_blocks: int = 256
    """Most blocks being read from one peer at a time."""
    test_links: bool = False
    """Nothing is read over a new link before a test block has come over it as it was sent."""
    probe_blocks: int = 0
    """Most blocks read to measure a link; 0: none is measured."""
    probe_share: int = 32
    """A probe takes at most this share of the peer's pool, one block out of so many."""
    probe_interval_s: float = 300.0
    """A link to the same lifetime of a worker is measured at most this often."""
    probe_retry_s: float = 5.0
    """And tried again after this long if a prompt cut that short or it could not be done."""
    probe_read_s: float = 0.02
    """A probe ends with the first READ that takes as long: that is enough for a rate, and the next
    one would be twice as long and in the way of a hand-over."""
