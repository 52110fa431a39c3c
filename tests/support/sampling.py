"""Specs for sampler tests, and an oracle in float64 that says which tokens a draw may give."""

from typing import Any

import torch

from core.sampling import SamplingParams
from engine.grammar.backend import Words, mask_of
from engine.plan import SampleSpec
from engine.sampler.logits import modify_
from engine.sampler.philox import uniform

SLACK = 2e-6
"""Share of the mass by which rounding may move the border between two tokens, or a limit."""


def make_spec(
    position: int = 0,
    prompt: tuple[int, ...] | list[int] = (),
    output: tuple[int, ...] | list[int] = (),
    banned: tuple[int, ...] = (),
    mask: "AllowedIds | None" = None,
    **params: Any,
) -> SampleSpec:
    return SampleSpec(SamplingParams(**params), position, prompt, output, banned, mask)


class AllowedIds:
    """A TokenMask that allows the ids it was given."""

    def __init__(self, vocab_size: int, *allowed: int) -> None:
        self._words = mask_of(allowed, vocab_size)

    def words(self) -> Words:
        return self._words


def assert_drawn(row: torch.Tensor, spec: SampleSpec, token_id: int) -> None:
    """The token is the reference's, up to rounding."""
    logits = row.cpu().float().clone()
    modify_(logits, spec)
    if spec.params.greedy:
        assert token_id == int(logits.numpy().argmax())
        return
    probs = torch.softmax((logits.double() - logits.max()) / spec.params.temperature, -1)
    draw = uniform(spec.params.seed, spec.position)
    intervals = []
    for slack in (0.0, -SLACK, SLACK):
        kept = torch.where(_keeps(probs, spec, 1 + slack), probs, 0.0)
        kept /= kept.sum()
        end = kept.cumsum(0)[token_id].item()
        start = end - kept[token_id].item()
        intervals.append((start, end))
        if end > start and start - SLACK <= draw <= end + SLACK:
            return
    raise AssertionError(f"{token_id} has {intervals}, the draw is {draw}: {spec}")


def _keeps(probs: torch.Tensor, spec: SampleSpec, scale: float) -> torch.Tensor:
    params = spec.params
    ordered = probs.sort(descending=True).values
    least = 0.0
    if 0 < params.top_k < len(probs):
        ordered = ordered[: params.top_k]
        least = ordered[-1].item()
    if params.top_p < 1:
        reached = ordered.cumsum(0) >= params.top_p * scale * ordered.sum()
        last = int(reached.int().argmax()) if bool(reached.any()) else len(ordered) - 1
        least = ordered[last].item()
    return probs >= max(least, params.min_p * scale * probs.max().item())
