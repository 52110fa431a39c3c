"""What placement decided for one attempt and why: kept for the timeline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_CANDIDATES = 16
"""Candidates and refusals kept of one decision, best first: timelines must stay small."""


class Mode(StrEnum):
    """How the phases of a request are spread over workers."""

    DISAGGREGATED = "disaggregated"
    LOCAL = "local"
    """A decode worker computes the prompt too, though prefill workers exist."""
    DECODE_ONLY = "decode_only"
    """No prefill worker could take it."""
    PREFILL_ONLY = "prefill_only"
    """No decode worker could take it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker in one part, with every term of its cost in seconds."""

    worker: str
    part: str
    """prefill, decode or local."""
    cached_tokens: int
    terms: Mapping[str, float]

    @property
    def cost_s(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        terms = {name: round(value, 6) for name, value in self.terms.items()}
        return {
            "worker": self.worker,
            "part": self.part,
            "cached_tokens": self.cached_tokens,
            "cost_s": round(self.cost_s, 6),
            **terms,
        }


@dataclass(frozen=True, slots=True)
class TransferRate:
    """Speed of a pair's link, as the decode worker measured it or as the settings assume."""

    bytes_per_s: float
    measured: bool

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"bytes_per_s": round(self.bytes_per_s), "measured": self.measured}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A worker or pair that could not be chosen."""

    workers: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{' + '.join(self.workers)}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The chosen workers. `prefill` is None in every mode but DISAGGREGATED."""

    mode: Mode
    worker: str
    """Generates the output."""
    prefill: str | None
    cached_tokens: int
    """Of the prompt, on the worker that computes it, as predicted."""
    why: str
    candidates: Sequence[Candidate]
    refused: Sequence[Refusal]
    transfer: TransferRate | None = None
    """How fast KV was expected to move between the two; None where none moves."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "mode": self.mode.value,
            "prefill": self.prefill,
            "decode": self.worker,
            "predicted_cached_tokens": self.cached_tokens,
            "why": self.why,
            "transfer_rate": self.transfer and self.transfer.as_dict(),
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "refused": [str(refusal) for refusal in self.refused],
        }
