"""Which misfortunes may befall the world of tests/support/handover_world.py."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Which misfortunes may happen, each at any moment and at most once per key."""

    num_keys: int = 1
    last_time: int = 0
    """How often time may advance, by 1 each."""
    time_step: float = 1
    decode_clock_rate: float = 1.0
    prefill_fails: bool = False
    decode_aborts: bool = False
    link_breaks: bool = False
    reads_fail: bool = False
    cached_blocks: int = 0
    late_submit: bool = False
    """Prefill may learn of the request at any moment, also after decode's Claim; else before."""
    never_lands: bool = False
    """No READ lands once it has begun: the peer is frozen."""
    offered: bool = False
    """Begin when the link is up and renewed, and the lease offered."""
    drift_ratio: float = 0.05
    probes: bool = False
    """Decode measures the link whenever it may. Begin when the first key was delivered; others are
    submitted to decode at any moment."""
    decode_is_full: bool = False
    """It has no blocks for a probe."""
