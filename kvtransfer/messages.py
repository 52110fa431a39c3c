"""What decode and prefill say to each other over a link, as plain values.

`wire.py` turns them into protobuf and back; both state machines speak only these. A link is FIFO
and reliable until it closes: the rules in `export.py` and `handover.py` depend on that order.
"""

from dataclasses import dataclass
from typing import NamedTuple

from core.kv_layout import KvLayout
from core.tokens import TokenLogprobs
from core.version import PROTOCOL
from kvtransfer.head_slices import layout_mismatch


class Key(NamedTuple):
    """Names one attempt at one request, and so one hand-over."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message each way: who speaks and what its pool looks like."""

    worker_id: str
    epoch: int
    """One lifetime of the worker's pool."""
    model_digest: bytes
    layout: KvLayout
    """Of the whole model's blocks; each rank holds its share of the heads."""
    num_blocks: int
    transport: str
    rank_metadata: tuple[bytes, ...] = ()
    """What the peer's transport needs in order to read each rank's pool, by rank; empty when nobody
    reads them."""
    lease_ttl_s: float = 0.0
    """How long a lease of prefill outlives the latest Renew; 0 from decode."""
    could_use_nixl: bool = False
    """It moves KV by tcp, and NIXL with RDMA would work here."""
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Claim:
    """Decode will take this hand-over."""

    key: Key


@dataclass(frozen=True, slots=True)
class Renew:
    """Decode is alive: extend every lease of this link."""

    seq: int


@dataclass(frozen=True, slots=True)
class Release:
    """Decode reads no more under this claim."""

    key: Key


@dataclass(frozen=True, slots=True)
class Probe:
    """Lease this many blocks of no content, to be read for the time that it takes."""

    key: Key
    num_blocks: int


DecodeMessage = Hello | Claim | Renew | Release | Probe


@dataclass(frozen=True, slots=True)
class Offer:
    """A lease exists from here on."""

    key: Key
    lease_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Blocks [first_block, first_block + len(block_ids)) of the prompt are complete."""

    lease_id: int
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The prompt is complete and its first token sampled."""

    lease_id: int
    num_tokens: int
    model_digest: bytes
    epoch: int
    first_token: int
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0
    """Prompt tokens that prefill found in its own prefix cache."""


@dataclass(frozen=True, slots=True)
class Revoke:
    """There will be no Commit for this key, or the lease is over."""

    key: Key
    error_code: str
    error_message: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """Prefill has taken Renew `seq`; every lease not revoked before this message still holds."""

    seq: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The hello does not fit; the link ends."""

    reason: str


PrefillMessage = Hello | Offer | Progress | Commit | Revoke | Renewed | Refused


def hello_mismatch(own: Hello, peer: Hello) -> str:
    """Why two workers can't exchange blocks, empty when they can. Both sides ask, on each hello."""
    if own.protocol != peer.protocol:
        return (
            f"{peer.worker_id} speaks protocol {peer.protocol}, {own.worker_id} {own.protocol}; "
            "give both the same version of Diptych."
        )
    if own.model_digest != peer.model_digest:
        return (
            f"{peer.worker_id} serves a model with digest {peer.model_digest.hex()}, "
            f"{own.worker_id} one with {own.model_digest.hex()}; give both the same weights."
        )
    mismatch = layout_mismatch(own.layout, peer.layout)
    if mismatch:
        return (
            f"The KV blocks of {peer.worker_id} differ from those of {own.worker_id}: {mismatch}; "
            "give both the same block size and dtype."
        )
    if own.transport != peer.transport:
        return (
            f"{peer.worker_id} moves KV by {peer.transport}, {own.worker_id} by {own.transport}; "
            "give both the same transport."
        )
    return ""
