"""The seam between the HTTP side of the router and the side that finds workers.

The API turns a client's request into GenerationRequests and reads tokens from Generations;
placement, attempts, failover and accounting stay behind `Generator`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, TokenLogprobs
from telemetry.trace_context import TraceContext


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate; a client's request with n > 1 becomes n of these."""

    request_id: str
    """Unique in this router."""
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    deadline: float
    """When the request must have ended, on the router's monotonic clock, in seconds."""
    received_at: float
    """When the router read the client's request, same clock: where the time ledger starts."""
    tokenized_at: float
    cache_salt: str = ""
    key: str = ""
    """Whose request it is: the queue serves keys in turn."""
    priority: int = 1
    """Its class, 0 is served first; see router.admission.Priority."""
    shares_prompt_with: str | None = None
    """Id of the sequence of the same prompt that was asked for first, if this is another."""
    trace: TraceContext | None = None
    """What the client's call is part of."""

    @property
    def trace_id(self) -> str | None:
        """Of the client's trace, for logs and timelines."""
        return None if self.trace is None else self.trace.trace_id


@dataclass(slots=True)
class Token:
    """One generated token, each index exactly once and in order.

    Nobody changes it; it is not frozen because making one that is takes twice the time.
    """

    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEnd:
    """How a generation ended well. Failures are raised as core.errors.DiptychError instead."""

    finish_reason: FinishReason
    """STOP, LENGTH or ABORTED."""
    matched_stop: int | None = None
    cached_tokens: int = 0
    mode: str = ""
    """disaggregated, or which pool served it alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the workers serve."""

    name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


Take = Callable[[Sequence[Token]], bool]
"""Takes tokens, at least one, without waiting; False if it wants no more for now."""


class Generation(Protocol):
    """A running sequence. Leaving its context, for whatever reason, frees both workers."""

    async def begun(self) -> None:
        """Wait until there is a token, or there never will be."""
        ...

    async def feed(self, take: Take) -> bool:
        """Call `take` with all tokens that there are, and with others the moment they arrive.

        One reader at a time. Tokens that arrive while it does not wait here are kept for it. What
        `take` raises is raised here.

        Returns:
            True if `take` wanted no more for now; False after the last token.

        Raises:
            DiptychError: the sequence can't go on; raised once, after the tokens that were made.
        """
        ...

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Of the whole prompt, if asked for, from the first token on; None before.

        None too for a prompt of one token, of which there is nothing to say.
        """
        ...

    @property
    def end(self) -> GenerationEnd:
        """How it ended; before `feed` returned False, how it ends if it is left now."""
        ...


class Generator(Protocol):
    """Runs sequences on the fleet."""

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Place and run one sequence.

        Raises:
            InvalidRequestError: prompt + max_tokens do not fit the model's context.
            OverloadedError: the queue is full.
            UnavailableError: no worker can take it.
        """
        ...

    @property
    def model(self) -> ServedModel:
        """Raises UnavailableError until a worker has said what it serves."""
        ...

    @property
    def ready(self) -> bool:
        """True if a request would be admitted now."""
        ...

    def timeline(self, request_id: str) -> dict[str, object] | None:
        """The stage ledger and routing decision of a recent request, None if unknown."""
        ...

    def explain(self, request_id: str) -> dict[str, object] | None:
        """Every candidate of each of a recent request's decisions, None if unknown."""
        ...

    def abort(self, request_id: str) -> bool:
        """End a sequence with what it has, finish reason ABORTED; False if it does not run."""
        ...

    def abort_all(self) -> int:
        """End every sequence so; returns how many there were."""
        ...


class FleetControl(Protocol):
    """What can be asked of the workers as a whole."""

    async def flush_caches(self) -> list[dict[str, object]]:
        """Have each worker forget what nothing holds: one entry each, with `error` if it failed."""
        ...

    def describe(self) -> list[dict[str, object]]:
        """What is known of each worker, for JSON."""
        ...
