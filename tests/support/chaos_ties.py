"""Answers that rounding may change: how near the draws of a request come to another token.

A token is drawn where a random number falls among cumulated probabilities. Float32 differs in its
last bits with what shares a batch, so a number within a millionth of a border, once in some
ten thousand answers, may fall to either side: two answers are right then, and no failure is found.
"""

from collections import Counter
from pathlib import Path

import torch

from engine.sampler.philox import uniform
from router.api.sampling import choice_seed
from tests.support.chaos_requests import ChaosRequest
from tests.support.oracle import Oracle

ROUNDING = 4e-6
"""A border nearer than this may be crossed; one was seen crossed at 5e-7."""
MOST_TIES = 2
"""More among a few hundred answers are no chance."""


def is_near_tie(folder: Path, request: ChaosRequest) -> bool:
    """True if some draw of the request, computed in float64, lies that near to another token.

    Only where the sampler alone decides; a mask of structured output is not known here.
    """
    if request.kind in ("grammar", "tools", "invalid"):
        return False
    oracle, body = Oracle(folder, torch.float64), request.body
    if "messages" in body:
        prompt = oracle.chat_ids(body["messages"])
    else:
        prompt = oracle.tokenizer(body["prompt"])["input_ids"]
    margins = [_least_margin(oracle, request, prompt, choice) for choice in range(body.get("n", 1))]
    return min(margins) < ROUNDING


def _least_margin(oracle: Oracle, request: ChaosRequest, prompt: list[int], choice: int) -> float:
    body = request.body
    output: list[int] = []
    least = 1.0
    for position in range(body["max_tokens"]):
        logits = oracle.logits([*prompt, *output])
        for token, count in Counter(output).items():
            logits[token] -= body.get("frequency_penalty", 0.0) * count
        if not body["temperature"]:
            first, second = logits.topk(2).values.tolist()
            token, margin = int(logits.argmax()), first - second
        else:
            seed = choice_seed(body["seed"], choice)
            token, margin = _draw(logits / body["temperature"], body, uniform(seed, position))
        output.append(token)
        least = min(least, margin)
    return least


def _draw(logits: torch.Tensor, body: dict[str, float], number: float) -> tuple[int, float]:
    """The token that a number from [0, 1) falls on, and how near the next border is."""
    probs = torch.softmax(logits, -1)
    ordered = probs.sort(descending=True).values
    kept, edges = ordered, [1.0]
    if body.get("top_k"):
        kept = ordered[: int(body["top_k"])]
        edges.append(float(kept[-1] - ordered[len(kept)]))
    if body.get("top_p", 1.0) < 1:
        cumulative = kept.cumsum(0) / kept.sum()
        edges.append(float((cumulative - body["top_p"]).abs().min()))
        kept = kept[: int(torch.searchsorted(cumulative, body["top_p"])) + 1]
    threshold = float(kept[-1])
    if body.get("min_p"):
        least = body["min_p"] * float(ordered[0])
        edges.append(float((probs - least).abs().min()))
        threshold = max(threshold, least)
    cumulative = probs.masked_fill(probs < threshold, 0.0).cumsum(0)
    target = number * float(cumulative[-1])
    token = int(torch.searchsorted(cumulative, target, right=True))
    below = float(cumulative[token - 1]) if token else 0.0
    margin = min(target - below, float(cumulative[token]) - target)
    # A token at the edge of what is kept moves all borders by its own probability.
    return token, margin - threshold if min(edges) < ROUNDING else margin
