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
    proves: bool = False
    """Decode reads nothing over a link before a test block came over it."""
    garbles: bool = False
    """What comes over the first link is not what was sent, and the transport does not notice."""
    enough: bool = False
    """The first token may end a request; its router then takes decode's part back."""
    withdraws: bool = False
    """The router may give up decode's part, and tells prefill so."""

    @property
    def calm(self) -> bool:
        """Nothing happens that may fail a hand-over."""
        broken = self.link_breaks or self.reads_fail or self.garbles or self.prefill_fails
        return not (broken or self.last_time or self.withdraws)
