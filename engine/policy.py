"""Who is admitted next: small functions over the waiting queue, chosen by EngineConfig.policy.

A policy orders, it decides nothing else: the scheduler takes candidates from its front while there
is room. Preempted sequences are not asked about; they always come first.
"""

from collections.abc import Callable, Collection, Iterable
from itertools import islice

from core.errors import ConfigError
from engine.sequence import SequenceState

CachedTokens = Callable[[SequenceState], int]
"""Tokens of a waiting sequence that the prefix cache holds now."""
Policy = Callable[[Collection[SequenceState], CachedTokens, float], Iterable[SequenceState]]
"""(waiting in order of arrival, cached tokens, now in seconds) -> candidates, best first."""

PREFIX_WINDOW = 128
"""Oldest waiting sequences that are compared by prefix; bounds the work of a step."""
PREFIX_PATIENCE_S = 2.0
"""A sequence that waited longer than this is no longer overtaken."""


def first_come_first_served(
    waiting: Collection[SequenceState], cached_tokens: CachedTokens, now: float
) -> Iterable[SequenceState]:
    """In order of arrival."""
    return waiting


def longest_prefix_first(
    waiting: Collection[SequenceState], cached_tokens: CachedTokens, now: float
) -> Iterable[SequenceState]:
    """Most cached tokens first, so that a prefix is used before it is evicted.

    Source: cache-aware scheduling of RadixAttention (arXiv:2312.07104, section 3), with a bound on
    how long a sequence without a cached prefix can be overtaken.
    """
    window = list(islice(waiting, PREFIX_WINDOW))
    patient = [sequence for sequence in window if now - sequence.arrived_at < PREFIX_PATIENCE_S]
    overdue = [sequence for sequence in window if now - sequence.arrived_at >= PREFIX_PATIENCE_S]
    return overdue + sorted(patient, key=cached_tokens, reverse=True)


def policy_named(name: str) -> Policy:
    """The policy that a configuration names.

    Raises:
        ConfigError: there is no such policy.
    """
    policies: dict[str, Policy] = {
        "fcfs": first_come_first_served,
        "longest_prefix": longest_prefix_first,
    }
    if name not in policies:
        raise ConfigError(f"policy must be one of {', '.join(policies)}, got {name!r}.")
    return policies[name]
