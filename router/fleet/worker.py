"""What the router knows of a worker, in its own words. Frozen values, made by fleet.wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from core.errors import ErrorCode
from core.finish import FinishReason
from core.tokens import PromptLogprobs
from router.generation import Token


class Role(StrEnum):
    """Which pool a worker is in. Every worker can do both phases."""

    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(StrEnum):
    """How the router sees a worker."""

    LOST = "lost"
    """Not attached: never reached yet, or its stream ended."""
    READY = "ready"
    DRAINING = "draining"
    """Finishes what it has and takes nothing new."""
    STALLED = "stalled"
    """Its engine loop stands still."""


class Phase(StrEnum):
    """What one worker does for one attempt of a request."""

    LOCAL = "local"
    EXPORT = "export"
    IMPORT = "import"


class Distance(StrEnum):
    """How far apart two workers are."""

    UNKNOWN = "unknown"
    """They share no label, or one of them has none."""
    HOST = "host"
    RACK = "rack"
    ZONE = "zone"
    APART = "apart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker runs, as far as it says so; an empty label says nothing."""

    zone: str = ""
    rack: str = ""
    host: str = ""

    def filled(self, other: "Place") -> "Place":
        """With what it does not say taken from another."""
        return Place(
            zone=self.zone or other.zone, rack=self.rack or other.rack, host=self.host or other.host
        )

    def distance(self, other: "Place") -> Distance:
        """The smallest thing that both are in; APART if they are known to share nothing."""
        shared, differ = Distance.UNKNOWN, False
        for label in (Distance.ZONE, Distance.RACK, Distance.HOST):
            mine, theirs = getattr(self, label.value), getattr(other, label.value)
            if mine and theirs:
                if mine != theirs:
                    differ = True
                    break  # names within two zones or racks mean nothing to each other
                shared = label
        return Distance.APART if differ and shared is Distance.UNKNOWN else shared


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """How KV blocks, with the heads of all ranks, lie in memory; only equal ones are exchanged."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """What a worker said of itself when the router attached."""

    worker_id: str
    epoch: int
    role: Role
    model: str
    model_digest: bytes
    layout: KvLayout
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_address: str
    """Where decode workers fetch its KV; empty when it exports none."""
    place: Place = Place()


class LinkFailure(NamedTuple):
    """Why no KV comes from a prefill worker, as a test block has shown."""

    epoch: int
    """Of the prefill worker; of another lifetime nothing is known."""
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A load report. Rates are 0 until the worker has measured them."""

    state: WorkerState = WorkerState.READY
    heartbeat_age_s: float = 0.0
    """How old the numbers were when the worker sent them."""
    waiting: int = 0
    running: int = 0
    backlog_tokens: int = 0
    held_blocks: int = 0
    cached_blocks: int = 0
    """Held by nothing but the prefix cache, so free to be taken."""
    awaited_blocks: int = 0
    """Blocks that prompts on their way to a decode worker will take and have not been given yet."""
    leases: int = 0
    """Hand-overs under way: of decode, prompts whose KV is awaited or on its way."""
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    host_bytes_per_s: float = 0.0
    """How fast it copies blocks between its device and its host's memory."""
    link_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """Prefill worker id to how fast this decode worker reads its KV, as far as measured."""
    link_latency_s: Mapping[str, float] = field(default_factory=dict)
    """Prefill worker id to the least time that a READ of one KV block took, as far as measured."""
    link_failures: Mapping[str, LinkFailure] = field(default_factory=dict)
    """Prefill worker id to why this decode worker takes no KV from it, where it does not."""
    transport: str = ""
    """What KV comes by; empty of a worker that reads none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as the router sees it now."""

    address: str
    role: Role
    """As it says itself; while it is lost, as it is listed."""
    pool: str = ""
    """As it is listed; empty if its list knows no pools."""
    state: WorkerState
    cause: str
    """Why it is lost; empty if it is not."""
    info: WorkerInfo | None
    """None while it is lost."""
    load: WorkerLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChange:
    """What changed in a worker's prefix cache; see CacheEvents of the wire."""

    epoch: int
    seq: int
    reset: bool
    stored: Sequence[bytes]
    removed: Sequence[bytes]
    host_stored: Sequence[bytes] = ()
    """In the memory of the worker's host, from where blocks come back when they are needed."""
    host_removed: Sequence[bytes] = ()


TokenRun = tuple[str, int, Sequence[Token], int | None]
"""Request id, attempt and consecutive tokens of one request from one worker, and how many prompt
tokens a cache spared, where the worker says so. Made per token: names would cost more than it."""


@dataclass(frozen=True, slots=True)
class PromptRun:
    """What a worker says of consecutive prompt tokens of one request."""

    request_id: str
    attempt: int
    logprobs: PromptLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds that a worker spent on one request, by stage."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_queue_s: float = 0.0
    first_decode_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LegEnd:
    """A worker's last word about its part of an attempt."""

    request_id: str
    attempt: int
    reason: FinishReason
    error_code: ErrorCode = ErrorCode.INTERNAL
    """Only of FAILED."""
    error_message: str = ""
    cached_tokens: int = 0
    kv_bytes: int = 0
    times: StageTimes | None = None
    matched_stop: int | None = None
