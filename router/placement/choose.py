"""The choice itself: a pure function from what is known of the workers to a Placement.

A pair costs what its prefill worker costs, what its decode worker costs, and the transfer between
them, at the speed that the decode worker measured or the settings assume (see `pairing.py`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from core.errors import UnavailableError
from router.fleet.worker import KvLayout, Role, WorkerState
from router.placement.cost import (
    CostSettings,
    Prompt,
    WorkerView,
    cached_tokens,
    decode_terms,
    prefill_terms,
    transfer_bytes,
)
from router.placement.decision import MAX_CANDIDATES, Candidate, Mode, Placement, Refusal
from router.placement.pairing import Scored, cheapest_pair, link_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be placed, and under which conditions."""

    prompt: Prompt
    matched_blocks: Mapping[str, int] = field(default_factory=dict)
    """Leading blocks of the prompt in each worker's cache."""
    avoid: Collection[str] = ()
    """Workers that failed this request."""
    allow_avoided: bool = False
    """Take one of them if there is no other."""
    model_digest: bytes | None = None
    """Only workers with this digest: another model would not continue the output alike."""


def choose(
    views: Sequence[WorkerView],
    demand: Demand,
    settings: CostSettings,
    *,
    local_prefill_max_tokens: int = 0,
    absent: Sequence[Refusal] = (),
) -> Placement:
    """The cheapest way to serve the demand now.

    Args:
        views: attached workers.
        demand: what is to be placed.
        settings: values assumed until measured.
        local_prefill_max_tokens: uncached tokens up to which decode computes the prompt itself.
        absent: workers that are known but not attached, with the reason.

    Raises:
        UnavailableError: every worker was refused; the message says why each was.
    """
    refused = list(absent)
    usable = []
    for view in views:
        reason = _refusal(view, demand)
        if reason is None:
            usable.append(view)
        else:
            refused.append(Refusal((view.key,), reason))

    first = [view for view in usable if view.key not in demand.avoid]
    rounds = [first, usable] if demand.allow_avoided and len(first) < len(usable) else [first]
    for candidates in rounds:
        placement = _choose_among(candidates, demand, settings, local_prefill_max_tokens, refused)
        if placement is not None:
            return placement
    refused += [
        Refusal((view.key,), "failed this request") for view in usable if view.key in demand.avoid
    ]
    reasons = "; ".join(str(refusal) for refusal in refused[:MAX_CANDIDATES])
    raise UnavailableError(f"No worker can take the request: {reasons or 'none is configured'}.")


def _refusal(view: WorkerView, demand: Demand) -> str | None:
    if view.load.state is not WorkerState.READY:
        return f"is {view.load.state.value}"
    total, limit = demand.prompt.total_tokens, view.info.max_model_len
    if total > limit:
        return f"prompt and max_tokens make {total} tokens, its context holds {limit}"
    if demand.model_digest not in (None, view.info.model_digest):
        return "serves another model than the one that began the output"
    return None


def _choose_among(
    views: Sequence[WorkerView],
    demand: Demand,
    settings: CostSettings,
    local_prefill_max_tokens: int,
    refused: list[Refusal],
) -> Placement | None:
    prompt = demand.prompt

    def cached(view: WorkerView) -> int:
        return cached_tokens(view, prompt, demand.matched_blocks.get(view.key, 0))

    def score(view: WorkerView, part: str) -> Scored:
        terms = _terms(view, part, prompt, cached(view), settings)
        kv_bytes = transfer_bytes(view, prompt, cached(view)) if part == "decode" else 0
        return Scored(view, Candidate(view.key, part, cached(view), terms), kv_bytes)

    prefill = [view for view in views if view.info.role is Role.PREFILL]
    decode = [view for view in views if view.info.role is Role.DECODE]

    nearby = [
        view for view in decode if prompt.num_tokens - cached(view) <= local_prefill_max_tokens
    ]
    if nearby:
        scored = sorted((score(view, "local") for view in nearby), key=lambda each: each.order)
        why = f"at most {local_prefill_max_tokens} tokens are not cached on the decode worker"
        return _alone(scored, Mode.LOCAL, why, refused)

    pair = _choose_pair(
        [score(view, "prefill") for view in prefill],
        [score(view, "decode") for view in decode],
        settings.transfer_bytes_per_s,
        refused,
    )
    if pair is not None or not views:
        return pair
    scored = sorted((score(view, "local") for view in views), key=lambda each: each.order)
    if scored[0].view.info.role is Role.DECODE:
        missing, mode = ("prefill" if not prefill else "matching prefill"), Mode.DECODE_ONLY
    else:
        missing, mode = ("decode" if not decode else "matching decode"), Mode.PREFILL_ONLY
    return _alone(scored, mode, f"no {missing} worker can take it", refused)


def _terms(
    view: WorkerView, part: str, prompt: Prompt, cached: int, settings: CostSettings
) -> dict[str, float]:
    match part:
        case "prefill":
            return prefill_terms(view, prompt, cached, settings)
        case "decode":
            return decode_terms(view, prompt, cached, settings)
        case _:
            return prefill_terms(view, prompt, cached, settings) | decode_terms(
                view, prompt, cached, settings
            )


def _choose_pair(
    prefill: Sequence[Scored], decode: Sequence[Scored], assumed: float, refused: list[Refusal]
) -> Placement | None:
    groups: dict[tuple[bytes, KvLayout], tuple[list[Scored], list[Scored]]] = {}
    for side, members in enumerate((prefill, decode)):
        for scored in members:
            info = scored.view.info
            if side == 0 and not info.kv_address:
                refused.append(Refusal((scored.view.key,), "exports no KV"))
                continue
            groups.setdefault((info.model_digest, info.layout), ([], []))[side].append(scored)

    pairs = []
    for exporters, importers in groups.values():
        pair = cheapest_pair(exporters, importers, assumed)
        if pair is not None:
            pairs.append(pair)
        elif prefill and decode:
            reason = "no worker of the other pool has its model digest and KV layout"
            refused += [Refusal((each.view.key,), reason) for each in (*exporters, *importers)]
    if not pairs:
        return None
    best = min(pairs, key=lambda pair: pair.cost_s)
    exporter, importer = best.exporter, best.importer
    priced = [each.reading_at(link_rate(exporter, each, assumed)) for each in decode]
    ranked = [
        each.candidate
        for side in (prefill, priced)
        for each in sorted(side, key=lambda each: each.order)[: MAX_CANDIDATES // 2]
    ]
    return Placement(
        mode=Mode.DISAGGREGATED,
        worker=importer.view.key,
        prefill=exporter.view.key,
        cached_tokens=exporter.candidate.cached_tokens,
        why="least predicted seconds of all matching pairs",
        candidates=ranked,
        refused=tuple(refused[:MAX_CANDIDATES]),
        transfer=best.rate,
    )


def _alone(scored: Sequence[Scored], mode: Mode, why: str, refused: Sequence[Refusal]) -> Placement:
    best = scored[0]
    return Placement(
        mode=mode,
        worker=best.view.key,
        prefill=None,
        cached_tokens=best.candidate.cached_tokens,
        why=why,
        candidates=[each.candidate for each in scored[:MAX_CANDIDATES]],
        refused=tuple(refused[:MAX_CANDIDATES]),
    )
