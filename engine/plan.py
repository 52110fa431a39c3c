"""What the scheduler asks of the executor in one step, and what comes back. Plain data.

A step has one Chunk and one SampleSpec for each of hundreds of sequences. Nobody changes one, yet
they are not frozen: that would make them slow to build (see `benchmarks.engine_host_cost`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, TokenLogprobs

if TYPE_CHECKING:
    from engine.grammar.backend import Words

PENDING = -1
"""In `Chunk.token_ids`: the token that the step before samples for this sequence.

That step is still under way, so only the executor's device will know it. It is always the only
token of its chunk.
"""


class TokenMask(Protocol):
    """Which tokens may be sampled. Of the ids that a mask allows, some are in the vocabulary."""

    def words(self) -> "Words":
        """int32, [ceil(vocab_size / 32)]; token t is allowed if bit t % 32 of word t // 32 is set.

        Read while the step is submitted, after the model's work was queued where that is possible:
        if a token is pending, this waits for it.
        """


@dataclass(slots=True)
class SampleSpec:
    """Sample one token after the last token of a chunk."""

    params: SamplingParams
    position: int
    """Index of the token in the whole output; with the seed it fixes the random draw."""
    prompt_ids: Sequence[int]
    """Read only when penalties are on. The request's original prompt."""
    output_ids: Sequence[int]
    """Every token sampled so far, earlier attempts included. Read only when penalties are on; a
    sequence with penalties is never planned while a token of it is pending."""
    banned_ids: Sequence[int] = ()
    """Ids that may not be sampled now (end of sequence before min_tokens)."""
    mask: TokenMask | None = None
    """None: all other ids may be sampled."""


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """Prompt tokens whose log probabilities a chunk has to report."""

    first: int
    """Position of token_ids[0]; the token before it is in the chunk."""
    token_ids: Sequence[int]
    """At least one; each token before one of them is in the chunk, so the last may follow it."""
    num_top: int
    """How many of the most likely tokens to report at each position."""


@dataclass(slots=True)
class Chunk:
    """Tokens of one sequence to run through the model in this step."""

    request_id: str
    token_ids: Sequence[int]
    """Tokens to compute, [num_new], num_new >= 1; or PENDING alone."""
    start: int
    """Position of token_ids[0]; everything before it is in the KV pool already."""
    block_table: Sequence[int]
    """Ids of the blocks that hold positions [0, start + num_new), in order. The same list object
    from step to step, which only grows; a sequence that lost its blocks comes with another."""
    sample: SampleSpec | None
    """None while the prompt goes on after this chunk."""
    score: ScoreSpec | None = None
    """None: nothing of the prompt is to be reported."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: prompt chunks and single decode tokens in any mix."""

    chunks: Sequence[Chunk]

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens, aligned with `StepPlan.chunks`; None where nothing was to be sampled."""

    token_ids: Sequence[int | None]
    logprobs: Sequence[TokenLogprobs | None]
    scores: Mapping[int, PromptLogprobs] = field(default_factory=dict)
    """What chunks with a ScoreSpec report, by their index in the plan."""
