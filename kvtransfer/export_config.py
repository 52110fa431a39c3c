"""What bounds the prefill side of the hand-over. Read by `export.py`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Bounds of what prefill remembers."""

    max_early_claims: int = 4096
    """Claims of requests not submitted yet, per link; more are revoked."""
    max_endings: int = 4096
    """Ended keys remembered, so that a late word about them is answered rightly."""
    probe_share: int = 32
    """A probe gets at most this share of the pool, one out of so many blocks."""
    max_lease_s: float = 600.0
    """Longest a lease may go on after Commit or Revoke, however often it is renewed. The link of a
    decode worker that keeps one longer is closed, and the lease then runs out."""
