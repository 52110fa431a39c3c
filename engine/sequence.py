"""One sequence on its way through the engine: its tokens, its blocks and when it must end.

The scheduler moves it between waiting, running and ended; nothing else writes to it. Invariant:
token_ids is prompt + every output token that is known; the KV of token_ids[:num_computed] lies in
block_table; a waiting or running sequence has at least one token left to compute. Steps in flight
compute positions [num_computed, num_scheduled) and sample num_pending tokens, which follow
token_ids but are not in it yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from core.block_hash import hash_blocks
from core.errors import DiptychError
from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, TokenLogprobs
from engine.grammar.state import OutputGrammar
from engine.plan import SampleSpec, ScoreSpec
from engine.request import SequenceOutput


class SequenceStatus(StrEnum):
    """Where a sequence is. PREEMPTED waits too, ahead of all that were never admitted."""

    RESERVED = "reserved"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    ENDED = "ended"


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceState:
    """Everything the scheduler knows of one request."""

    request_id: str
    sampling: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: list[int]
    token_ids: list[int]
    """prompt_ids + output_ids: what must be in the KV pool before the next token is sampled."""
    block_hashes: list[bytes]
    """Hashes of the leading full blocks of token_ids, as far as they are known."""
    root_hash: bytes | None
    """Parent of the first block; None when unknown, so that only given hashes can be extended."""
    end_ids: tuple[int, ...]
    """Ids that end the output: end of sequence unless ignored, and the request's stop ids."""
    max_len: int
    """Length of token_ids at which the sequence ends."""
    prefill_only: bool
    needs_history: bool
    """True if a token can't be sampled before the host knows all tokens that precede it."""
    arrived_at: float
    grammar: OutputGrammar | None = None
    """What the output must be; None: anything."""
    status: SequenceStatus = SequenceStatus.WAITING
    expected_cached: int = 0
    """Tokens that the prefix cache was seen to hold while the sequence waits; an estimate."""
    age: int = -1
    """Order of first admission; -1 before. An older sequence may preempt a younger one."""
    block_table: list[int] = field(default_factory=list)
    num_slots: int = 0
    """Tokens that the blocks of block_table have room for."""
    num_computed: int = 0
    num_scheduled: int = 0
    """num_computed, and what steps in flight compute."""
    num_pending: int = 0
    """Tokens that steps in flight sample."""
    steps_in_flight: int = 0
    """Steps in flight that write to its blocks, which must not be freed before those are over."""
    num_registered: int = 0
    """Leading blocks of block_table that the prefix cache has been told of."""
    num_cached_tokens: int = 0
    """Tokens that the prefix cache spared at the first admission."""
    next_scored: int = 1
    """First prompt position whose log probabilities were not reported yet, if any are wanted."""
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None

    @property
    def num_to_compute(self) -> int:
        """Known tokens whose KV is missing; the last one is among them."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_unscheduled(self) -> int:
        """Tokens, pending ones included, that no step computes yet."""
        return len(self.token_ids) + self.num_pending - self.num_scheduled

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need no computing if their KV is there already.

        What a token says of the next one is known only where it is computed.
        """
        if self.sampling.prompt_logprobs is None or self.next_scored >= len(self.prompt_ids):
            return len(self.token_ids)
        return self.next_scored - 1

    @property
    def waits_for_grammar(self) -> bool:
        """True while its grammar is being compiled."""
        return self.grammar is not None and not self.grammar.begun

    @property
    def unusable_token(self) -> DiptychError | None:
        """Why the token that was sampled next can't be appended; None if it can."""
        return None if self.grammar is None else self.grammar.error_at(len(self.output_ids))

    @property
    def ends_when_known(self) -> bool:
        """True if the pending token is the last one, whatever it will be."""
        return self.prefill_only or len(self.token_ids) + self.num_pending >= self.max_len

    def sample_spec(self) -> SampleSpec:
        """How to sample the token after all pending ones. Lists are shared, not copied."""
        position = len(self.output_ids) + self.num_pending
        if self.grammar is None:
            mask = None
            banned = self.end_ids if position < self.sampling.min_tokens else ()
        else:
            mask = self.grammar.mask(position)
            banned = ()  # the mask knows of min_tokens
        return SampleSpec(self.sampling, position, self.prompt_ids, self.output_ids, banned, mask)

    def score_spec(self, start: int, end: int) -> ScoreSpec | None:
        """Which prompt tokens a chunk of positions [start, end) has to report; None for none.

        Chunks in flight report those before `start`.
        """
        num_top = self.sampling.prompt_logprobs
        if num_top is None:
            return None
        first, last = max(start + 1, self.next_scored), min(end + 1, len(self.prompt_ids))
        return ScoreSpec(first, self.prompt_ids[first:last], num_top) if first < last else None

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token and say whether it ends the sequence, and how."""
        self.output_ids.append(token_id)
        self.token_ids.append(token_id)
        if token_id in self.end_ids:
            self.finish_reason = FinishReason.STOP
            if token_id in self.sampling.stop_token_ids:
                self.matched_stop = token_id
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = FinishReason.LENGTH
        elif self.prefill_only:
            self.finish_reason = FinishReason.HANDED_OVER
        return self.finish_reason

    def report(
        self,
        token_id: int | None = None,
        logprobs: TokenLogprobs | None = None,
        error: DiptychError | None = None,
        scores: PromptLogprobs | None = None,
    ) -> SequenceOutput:
        """What the caller is told after a step; the token, if any, is the newest."""
        return SequenceOutput(
            request_id=self.request_id,
            token_ids=() if token_id is None else (token_id,),
            first_index=len(self.output_ids) - (token_id is not None),
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=scores,
            num_computed=self.num_computed,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
            error=error,
        )

    def extend_hashes(self, num_blocks: int, block_size: int) -> None:
        """Make the hashes of the first `num_blocks` blocks known, where a parent is known."""
        known = len(self.block_hashes)
        if known >= num_blocks:
            return
        parent = self.block_hashes[-1] if known else self.root_hash
        if parent is not None:
            tokens = self.token_ids[known * block_size : num_blocks * block_size]
            self.block_hashes += hash_blocks(tokens, block_size, parent)


def age_of(sequence: SequenceState) -> int:
    """What sequences that were admitted are sorted by."""
    return sequence.age
