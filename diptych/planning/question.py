"""From settings and measurements to what the search is asked: load, rates, caches, SLO.

What the user gives wins over what was measured, and that over assumptions; the answer says which
were assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from diptych.planning.fleet import Slo
from diptych.planning.measured import Measured
from diptych.planning.rates import WorkerRates
from diptych.planning.search import Caches, Cost
from diptych.planning.settings import PlanSettings
from diptych.planning.trace import TracedRequest, faster, made_up, read_trace

MADE_UP_S = 900.0
"""Time that made-up load lasts: long enough for queues to show, short enough to try many fleets."""
MADE_UP_REQUESTS = (500, 20_000)
"""Fewest and most requests of made-up load."""
FULL_STEP = 2.0
"""Step of a full batch over that of one sequence, where only one was measured.

Source: router/placement/cost.py assumes the same.
"""
ASSUMED_KV_BYTES, ASSUMED_LINK, ASSUMED_SEQS, ASSUMED_KV_TOKENS = 131_072.0, 20e9, 256, 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the search is asked."""

    requests: Sequence[TracedRequest]
    rates: WorkerRates
    caches: Caches
    slo: Slo
    cost: Cost
    assumed: Sequence[str]
    """Values that nobody gave or measured."""


def ask(settings: PlanSettings, measured: Measured) -> Question:
    """Put the question together.

    Raises:
        ConfigError: the load or a rate is neither given nor measured.
    """
    assumed: list[str] = []
    requests = _load(settings, measured)
    ratio = settings.hit_ratio
    if ratio is None and not any(each.hashes for each in requests):
        ratio = measured.hit_ratio
        if ratio is None:
            assumed.append("hit_ratio = 0")
            ratio = 0.0
    return Question(
        requests=requests,
        rates=_rates(settings, measured, assumed),
        caches=Caches(hit_ratio=ratio, tokens_per_replica=settings.cache_tokens),
        slo=Slo(ttft_s=settings.ttft_s, tpot_s=settings.tpot_s, share=settings.share),
        cost=Cost(prefill=settings.prefill_gpus, decode=settings.decode_gpus),
        assumed=assumed,
    )


def _load(settings: PlanSettings, measured: Measured) -> Sequence[TracedRequest]:
    if settings.trace is not None:
        return faster(read_trace(Path(settings.trace)), settings.speed)
    rate = settings.rate or measured.rate
    prompt_tokens = settings.prompt_tokens or measured.prompt_tokens
    output_tokens = settings.output_tokens or measured.output_tokens
    if not rate or not prompt_tokens or not output_tokens:
        raise ConfigError(
            "The system served no requests while it was watched, so there is no load to plan for. "
            "Send it some, watch it for longer, or give --trace beside it."
        )
    fewest, most = MADE_UP_REQUESTS
    return made_up(
        rate=rate * settings.speed,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        spread=settings.spread,
        count=min(most, max(fewest, round(rate * settings.speed * MADE_UP_S))),
    )


def _rates(settings: PlanSettings, measured: Measured, assumed: list[str]) -> WorkerRates:
    def known(name: str, default: float, shown: str = "") -> float:
        given = getattr(settings, name)
        value = getattr(measured, name) if given is None else given
        if value is None:
            assumed.append(f"{name} = {shown or f'{default:g}'}")
            return default
        return float(value)

    per_s = settings.prefill_tokens_per_s or measured.prefill_tokens_per_s
    if not per_s:
        raise ConfigError(
            "The prefill rate of a replica is not known: give --prefill-tokens-per-s, or a running "
            "system that has computed a prompt (--router, --prometheus)."
        )
    places = int(known("max_num_seqs", ASSUMED_SEQS))
    step_s, per_seq_s = _step(settings, measured, places, assumed)
    return WorkerRates(
        prefill_s_per_token=1 / per_s,
        step_s=step_s,
        step_s_per_seq=per_seq_s,
        kv_bytes_per_token=known("kv_bytes_per_token", ASSUMED_KV_BYTES),
        link_bytes_per_s=known("link_bytes_per_s", ASSUMED_LINK),
        max_num_seqs=places,
        kv_tokens=int(known("kv_tokens", ASSUMED_KV_TOKENS, "enough")),
    )


def _step(
    settings: PlanSettings, measured: Measured, places: int, assumed: list[str]
) -> tuple[float, float]:
    """Seconds of an empty batch's step, and more of them per sequence."""
    more = max(1, places - 1)
    if settings.decode_step_s is not None:
        one_s, full_s = settings.decode_step_s, settings.decode_step_full_s
        if full_s is None:
            assumed.append(f"a full batch's step takes {FULL_STEP:g} times that of one sequence")
            full_s = FULL_STEP * one_s
        if full_s < one_s:
            raise ConfigError("decode_step_full_s must not be less than decode_step_s.")
        per_seq_s = (full_s - one_s) / more
        return max(0.0, one_s - per_seq_s), per_seq_s
    if not measured.decode_step_s:
        raise ConfigError(
            "The decode step of a replica is not known: give --decode-step-s, or a running system "
            "that has generated tokens (--router, --prometheus)."
        )
    batch = max(1.0, measured.decode_batch or 1.0)
    if settings.decode_step_full_s is not None and places > batch:
        per_seq_s = max(0.0, settings.decode_step_full_s - measured.decode_step_s) / (
            places - batch
        )
    else:
        assumed.append(f"a full batch's step takes {FULL_STEP:g} times that of one sequence")
        one_s = measured.decode_step_s / (1 + (FULL_STEP - 1) * (batch - 1) / more)
        per_seq_s = one_s * (FULL_STEP - 1) / more
    return max(0.0, measured.decode_step_s - batch * per_seq_s), per_seq_s
