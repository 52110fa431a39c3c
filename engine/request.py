"""What the engine is asked for and what it answers: the words between it and its caller."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.errors import DiptychError
from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to generate."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    output_ids: Sequence[int] = ()
    """Tokens sampled by earlier attempts. They count for positions, penalties and max_tokens."""
    block_hashes: Sequence[bytes] | None = None
    """Hashes of the full blocks of prompt_ids + output_ids; None: computed here, without a salt."""
    root_hash: bytes | None = None
    """What block_hashes chain from; None with given hashes: unknown, so that a request which
    fills its first block only while generating is not cached."""
    prefill_only: bool = False
    """End with HANDED_OVER after the first sampled token, unless that token ends the output."""


@dataclass(slots=True, kw_only=True)
class SequenceOutput:
    """What one step did for one request. Not frozen, for speed; nobody changes one."""

    request_id: str
    token_ids: Sequence[int] = ()
    first_index: int = 0
    """Index of token_ids[0] in the whole output."""
    logprobs: Sequence[TokenLogprobs] = ()
    """One per token if asked for."""
    prompt_logprobs: PromptLogprobs | None = None
    """Of what the step computed of the prompt, if asked for; each position once."""
    num_computed: int = 0
    """Tokens of prompt + output whose KV is in the pool now."""
    num_cached_tokens: int = 0
    """Tokens that the prefix cache spared when the request was first admitted."""
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    error: DiptychError | None = None
    """Why, when finish_reason is FAILED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Blocks set aside for KV that comes from elsewhere. Ends with `Engine.adopt` or `cancel`."""

    request_id: str
    num_tokens: int
    """Prompt tokens and earlier output: what the KV must cover."""
    block_table: Sequence[int]
    """Blocks of [0, num_tokens), in order. The first num_cached_blocks must not be written."""
    num_cached_tokens: int
    num_cached_blocks: int
    """Leading blocks whose KV is here already."""


@dataclass(frozen=True, slots=True)
class CacheChange:
    """Hashes that the prefix cache gained and lost since it was last asked, in no order."""

    stored: Sequence[bytes] = ()
    removed: Sequence[bytes] = ()
    host_stored: Sequence[bytes] = ()
    """Of the tier in host memory. What moves between tiers is in two of these."""
    host_removed: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierStats:
    """The tier in host memory; all zero without one. free + cached + held == total, always."""

    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    held_blocks: int = 0
    """Copies read or write them."""
    hit_tokens: int = 0
    """Tokens whose KV came back from there since start."""
    lost_blocks: int = 0
    """Blocks that the pool evicted before they were saved, since start."""
    saved_bytes: int = 0
    loaded_bytes: int = 0
    bytes_per_s: float = 0.0
    """Measured rate of copies, 0 until known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine's load. free + cached + held == total, always."""

    waiting: int = 0
    running: int = 0
    backlog_tokens: int = 0
    """Prompt tokens accepted and not yet computed."""
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    held_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    preemptions: int = 0
    cached_tokens: int = 0
    """Prompt tokens served from the prefix cache since start."""
    lookup_tokens: int = 0
    """Prompt tokens looked up in the prefix cache since start."""
    host: HostTierStats = HostTierStats()


@dataclass(slots=True)
class StepOutputs:
    """Everything one step changed."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    duration_s: float = 0.0
