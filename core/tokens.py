"""What an engine says about tokens: those that it sampled, and those of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one output position, from logits before any modification."""

    logprob: float
    """Of the sampled token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely tokens, most likely first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Natural-log probabilities of consecutive prompt tokens, each after all that precede it.

    Flat lists, because a long prompt has 100,000 of these. The first token of a prompt follows
    nothing, so positions start at 1.
    """

    first: int
    """Position in the prompt of the first token told about."""
    logprobs: Sequence[float]
    """Of the prompt's own tokens, [N]."""
    ranks: Sequence[int]
    """How likely those were among all tokens, 1 for the most likely, [N]."""
    num_top: int = 0
    top_ids: Sequence[int] = ()
    """The most likely tokens at each position, most likely first, [N * num_top]."""
    top_logprobs: Sequence[float] = ()
    """Of those, [N * num_top]."""

    @property
    def end(self) -> int:
        """Position after the last token told about."""
        return self.first + len(self.logprobs)

    def top(self, position: int, count: int) -> list[tuple[int, float]]:
        """(token id, logprob) of the `count` most likely tokens at a position that is told of."""
        start = (position - self.first) * self.num_top
        end = start + min(count, self.num_top)
        return list(zip(self.top_ids[start:end], self.top_logprobs[start:end], strict=True))

    def part(self, start: int, end: int) -> "PromptLogprobs":
        """Of positions [start, end) alone, which must be among those told of."""
        low, high = start - self.first, end - self.first
        return PromptLogprobs(
            first=start,
            logprobs=self.logprobs[low:high],
            ranks=self.ranks[low:high],
            num_top=self.num_top,
            top_ids=self.top_ids[low * self.num_top : high * self.num_top],
            top_logprobs=self.top_logprobs[low * self.num_top : high * self.num_top],
        )


def join_prompt_logprobs(parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
    """One of parts that follow each other; there is at least one."""
    return PromptLogprobs(
        first=parts[0].first,
        logprobs=[value for part in parts for value in part.logprobs],
        ranks=[rank for part in parts for rank in part.ranks],
        num_top=parts[0].num_top,
        top_ids=[token_id for part in parts for token_id in part.top_ids],
        top_logprobs=[value for part in parts for value in part.top_logprobs],
    )
