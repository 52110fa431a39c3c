"""How fast one replica is, as the planner, the placement simulator and closed-loop tests see it.

Frozen values; where they come from is measured.py's concern, or the command line's.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRates:
    """One replica of either pool. Its prefill and its step grow with what they are given."""

    prefill_s_per_token: float
    prefill_s_per_pair: float = 0.0
    """Per token and token before it: attention."""
    step_s: float
    """A decode step of an empty batch."""
    step_s_per_seq: float = 0.0
    step_s_per_token: float = 0.0
    """Per token of KV in the batch."""
    kv_bytes_per_token: float = 0.0
    link_bytes_per_s: float = 20e9
    max_num_seqs: int = 256
    kv_tokens: int = 1 << 40
    """KV that a decode replica can hold."""

    def prefill_s(self, new_tokens: int, cached: int) -> float:
        """Seconds to compute tokens after some that are cached."""
        seen = cached + new_tokens / 2
        return new_tokens * (self.prefill_s_per_token + self.prefill_s_per_pair * seen)

    def decode_step_s(self, batch: int, held_tokens: int) -> float:
        """Seconds of a step of so many sequences with so many tokens of KV."""
        return self.step_s + batch * self.step_s_per_seq + held_tokens * self.step_s_per_token

    def transfer_s(self, tokens: int) -> float:
        """Seconds to move the KV of so many tokens."""
        return tokens * self.kv_bytes_per_token / self.link_bytes_per_s
