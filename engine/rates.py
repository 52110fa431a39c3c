"""How fast this engine is, measured from its own steps; the router's cost rule reads it.

Owned by `Engine`. Recent steps count more than old ones; nothing is known before the first step of
its kind, and then the rate is 0.
"""

import math

DECAY = 0.9
"""Weight of the past at each new decode step or copy: about ten are remembered."""
PREFILL_MEMORY_TOKENS = 4096
"""Prompt tokens that are remembered, about. Not steps: a few short chunks, each of which takes a
whole step, would make out that prompts are computed slowly."""
MIN_PREFILL_TOKENS = 16
"""Shorter prefill steps measure the overhead of a step, not the rate of computing."""


class StepRates:
    """Exponentially weighted rates of prefill and decode."""

    def __init__(self) -> None:
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0
        self._decode_step_s = 0.0

    def observe(self, num_prefill_tokens: int, num_decode_tokens: int, duration_s: float) -> None:
        """Take one step into account."""
        if num_prefill_tokens >= max(MIN_PREFILL_TOKENS, num_decode_tokens):
            # Tokens and seconds decay apart, so that a long step weighs more than a short one.
            past = math.exp(-num_prefill_tokens / PREFILL_MEMORY_TOKENS)
            self._prefill_tokens = self._prefill_tokens * past + num_prefill_tokens
            self._prefill_s = self._prefill_s * past + duration_s
        elif num_decode_tokens and not num_prefill_tokens:
            past = self._decode_step_s or duration_s
            self._decode_step_s = past * DECAY + duration_s * (1 - DECAY)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second in steps that mostly prefill."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s > 0 else 0.0

    @property
    def decode_step_s(self) -> float:
        """Seconds of a step that only decodes."""
        return self._decode_step_s


class CopyRate:
    """Exponentially weighted rate of copies between the pool and host memory, either way."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._s = 0.0

    def observe(self, num_bytes: int, duration_s: float) -> None:
        """Take one copy into account."""
        self._bytes = self._bytes * DECAY + num_bytes
        self._s = self._s * DECAY + duration_s

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second; 0 until known."""
        return self._bytes / self._s if self._s > 0 else 0.0
