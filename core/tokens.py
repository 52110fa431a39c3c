"""What an engine says about a token that it sampled."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one output position, from logits before any modification."""

    logprob: float
    """Of the sampled token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely tokens, most likely first."""
