"""What it would cost, in seconds, to send a prompt to a worker. Pure functions over frozen values.

The simplest honest form of the design's rule. Prefill is predicted from measured rates. Decode is
predicted from the measured step and from how full the worker would be. Each term is kept by name,
so that a decision can be explained.
"""

from dataclasses import dataclass

from router.fleet.worker import WorkerInfo, WorkerLoad

EXPECTED_OUTPUT_TOKENS = 128
"""Output length assumed when a request allows more: most end before max_tokens.

Source: own judgement; only the ratio of decode to prefill terms depends on it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSettings:
    """Values assumed until measured."""

    prefill_tokens_per_s: float
    decode_step_s: float
    transfer_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as placement sees it: its latest report plus what was sent since."""

    key: str
    info: WorkerInfo
    load: WorkerLoad
    sent_tokens: int = 0
    """Uncached prompt tokens sent to it since the load report was taken."""
    sent_requests: int = 0
    """Requests sent to it since then that will occupy a place in its batch."""
    sent_blocks: int = 0
    """KV blocks that those will need."""
    placed: int = 0
    """Legs ever placed on it; evens out ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What placement needs to know of a request."""

    num_tokens: int
    """Prompt and output of earlier attempts: what must be in KV before decode goes on."""
    max_new_tokens: int

    @property
    def total_tokens(self) -> int:
        """Longest that the sequence can get."""
        return self.num_tokens + self.max_new_tokens


def cached_tokens(view: WorkerView, prompt: Prompt, matched_blocks: int) -> int:
    """Tokens that need not be computed; at least one always is."""
    return min(matched_blocks * view.info.layout.block_size, prompt.num_tokens - 1)


def prefill_terms(
    view: WorkerView, prompt: Prompt, cached: int, settings: CostSettings
) -> dict[str, float]:
    """Seconds until the worker has computed the prompt: those before it, then its own tokens."""
    rate = view.load.prefill_tokens_per_s or settings.prefill_tokens_per_s
    return {
        "backlog_s": (view.load.backlog_tokens + view.sent_tokens) / rate,
        "prefill_s": (prompt.num_tokens - cached) / rate,
    }


def transfer_bytes(view: WorkerView, prompt: Prompt, cached: int) -> int:
    """Bytes of KV that the decode worker `view` does not hold, and would have to read."""
    layout = view.info.layout
    return -(-(prompt.num_tokens - cached) // layout.block_size) * layout.block_bytes


def decode_terms(
    view: WorkerView, prompt: Prompt, cached: int, settings: CostSettings
) -> dict[str, float]:
    """Seconds to generate there, and to wait for a place in its batch and in its KV pool.

    A fuller batch makes each step slower, up to twice at a full one; a request beyond the batch or
    the pool waits for its share of one more generation.
    """
    info, load = view.info, view.load
    tokens = min(prompt.max_new_tokens, EXPECTED_OUTPUT_TOKENS)
    step_s = load.decode_step_s or settings.decode_step_s
    batch = load.running + load.waiting + view.sent_requests
    places = max(1, info.max_num_seqs)
    generation_s = tokens * step_s * (1 + min(1.0, batch / places))

    needed = -(-(prompt.num_tokens + tokens - cached) // info.layout.block_size)
    free = info.num_blocks - load.held_blocks - view.sent_blocks
    short = max(0.0, 1 - max(0, free) / needed) if info.num_blocks else 0.0
    over = max(0, batch + 1 - places) / places
    return {
        "decode_s": generation_s,
        "batch_wait_s": over * generation_s,
        "kv_wait_s": short * generation_s,
    }
