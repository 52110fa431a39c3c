"""What placement decided for one attempt and why: kept for the timeline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

MAX_CANDIDATES = 64
"""Candidates of one part and refusals kept of one decision, best first: a bound on its memory."""
MAX_SHOWN = 16
"""Of those, in a timeline."""


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
    host_tokens: int
    """Of the cached ones, those that it must copy from its host's memory first, about."""
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
            "host_tokens": self.host_tokens,
            "cost_s": round(self.cost_s, 6),
            **terms,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The candidates for one part, best first, as arrays: 50 bytes each instead of a kilobyte."""

    part: str
    names: Sequence[str]
    """Of workers by row; shared by decisions."""
    rows: NDArray[np.int64]
    """[candidates]"""
    cached_tokens: NDArray[np.float64]
    """[candidates]"""
    host_tokens: NDArray[np.float64]
    """[candidates]"""
    terms: Mapping[str, NDArray[np.float64]]
    """Seconds, [candidates]."""
    considered: int
    """How many there were, kept or not."""

    def candidates(self) -> list[Candidate]:
        """Each with its terms by name."""
        columns = {name: values.tolist() for name, values in self.terms.items()}
        return [
            Candidate(
                self.names[row],
                self.part,
                int(self.cached_tokens[i]),
                int(self.host_tokens[i]),
                {name: values[i] for name, values in columns.items()},
            )
            for i, row in enumerate(self.rows.tolist())
        ]


@dataclass(frozen=True, slots=True)
class CopyRate:
    """How fast KV moves, as the worker that gets it measured, or as is assumed."""

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
    rankings: Sequence[Ranking]
    """Of the plan that won first; then of the best plan that lost, if there was one."""
    refused: Sequence[Refusal]
    cost_s: float = 0.0
    """Of the plan that won."""
    alternatives: Mapping[str, float] = field(default_factory=dict)
    """Cost of the best plan of each other mode that was possible, seconds."""
    transfer: CopyRate | None = None
    """How fast KV was expected to move between the two; None where none moves."""
    host_copy: CopyRate | None = None
    """How fast the worker that computes was expected to copy what it has of the prompt in its
    host's memory; None where it has nothing of it there that is worth copying."""

    @property
    def candidates(self) -> list[Candidate]:
        """Of all rankings."""
        return [each for ranking in self.rankings for each in ranking.candidates()]

    def as_dict(self, limit: int = MAX_SHOWN) -> dict[str, object]:
        """For JSON, with at most `limit` candidates of each part."""
        return {
            "mode": self.mode.value,
            "prefill": self.prefill,
            "decode": self.worker,
            "predicted_cached_tokens": self.cached_tokens,
            "why": self.why,
            "cost_s": round(self.cost_s, 6),
            "alternatives_s": {mode: round(cost, 6) for mode, cost in self.alternatives.items()},
            "transfer_rate": self.transfer and self.transfer.as_dict(),
            "host_copy_rate": self.host_copy and self.host_copy.as_dict(),
            "considered": {ranking.part: ranking.considered for ranking in self.rankings},
            "candidates": [
                candidate.as_dict()
                for ranking in self.rankings
                for candidate in ranking.candidates()[:limit]
            ],
            "refused": [str(refusal) for refusal in self.refused[:limit]],
        }
