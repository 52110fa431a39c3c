"""The planner's answer: the fleet, what it makes of the load, how much more it would carry.

Made by main.py. Invariant: both forms say the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diptych.planning.fleet import Outcome
from diptych.planning.question import Question
from diptych.planning.search import Bench, Fleet, carried, smallest_fleet
from diptych.planning.trace import TracedRequest, faster


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """See the module."""

    question: Question
    headroom: float
    fleet: Fleet
    now: Outcome
    """Of the load as it is."""
    carries: float
    """Times the load as it is."""
    bottleneck: str
    """What fails first above that."""
    sensitivity: Mapping[Fleet, Outcome]
    """Of the planned load, on fleets with one replica less or more."""


def plan(question: Question, *, headroom: float, max_replicas: int) -> Answer:
    """Find the smallest fleet that meets the SLO with headroom.

    Raises:
        ConfigError: no fleet does.
    """

    def bench(requests: Sequence[TracedRequest]) -> Bench:
        return Bench(requests, question.caches, question.rates, question.slo)

    planned = bench(faster(question.requests, 1 + headroom))
    fleet = smallest_fleet(planned, question.cost, max_replicas=max_replicas)
    carries, beyond = carried(question.requests, fleet, bench)
    return Answer(
        question=question,
        headroom=headroom,
        fleet=fleet,
        now=bench(question.requests).outcome(fleet),
        carries=carries,
        bottleneck=bottleneck(beyond),
        sensitivity={near: planned.outcome(near) for near in neighbours(fleet)},
    )


def neighbours(fleet: Fleet) -> list[Fleet]:
    """The fleet itself, and those with a replica less or more of either kind."""
    return [
        Fleet(prefill=fleet.prefill + more, decode=fleet.decode + extra)
        for more in (-1, 0, 1)
        for extra in (-1, 0, 1)
        if fleet.prefill + more > 0 and fleet.decode + extra > 0
    ]


def bottleneck(beyond: Outcome) -> str:
    """What fails first, by what becomes of a load that is just too large."""
    if beyond.late_ttft >= beyond.late_tpot:
        return "prefill: prompts wait too long"
    if beyond.decode_kv > 0.7:
        return "decode: KV memory is full"
    if beyond.decode_batch > 0.7:
        return "decode: batches are full"
    return "decode: steps take too long"


def as_json(answer: Answer) -> dict[str, Any]:
    """For programs."""
    question = answer.question
    return {
        "load": load_of(answer),
        "slo": asdict(question.slo),
        "headroom": answer.headroom,
        "rates": asdict(question.rates),
        "assumed": list(question.assumed),
        "plan": asdict(answer.fleet) | {"cost": question.cost.of(answer.fleet)},
        "outcome": asdict(answer.now),
        "carries": answer.carries,
        "bottleneck": answer.bottleneck,
        "sensitivity": [
            asdict(fleet) | asdict(outcome) for fleet, outcome in answer.sensitivity.items()
        ],
    }


def load_of(answer: Answer) -> dict[str, float]:
    """The load in numbers."""
    requests = answer.question.requests
    bench = Bench(requests, answer.question.caches, answer.question.rates, answer.question.slo)
    prompts = sum(each.prompt_tokens for each in requests)
    return {
        "requests": len(requests),
        "rate": len(requests) / max(1e-9, requests[-1].arrives_at),
        "prompt_tokens": prompts / len(requests),
        "output_tokens": sum(each.output_tokens for each in requests) / len(requests),
        "hit_ratio": sum(bench.cached(answer.fleet.prefill)) / prompts,
    }


def as_text(answer: Answer) -> str:
    """For people."""
    question, fleet, now, load = answer.question, answer.fleet, answer.now, load_of(answer)
    slo = question.slo
    lines = [
        f"load         {load['requests']} requests, {load['rate']:.3g} per second; prompts of "
        f"{load['prompt_tokens']:.0f} tokens, {load['hit_ratio']:.0%} of them cached; outputs of "
        f"{load['output_tokens']:.0f}",
        f"SLO          TTFT within {slo.ttft_s:g} s and {slo.tpot_s * 1e3:g} ms per token for "
        f"{slo.share:.3g} of the requests, with {answer.headroom:.0%} more load",
        f"plan         {fleet.prefill} prefill + {fleet.decode} decode replicas "
        f"(cost {question.cost.of(fleet):g})",
        f"at this load {now.good:.1%} within the SLO; {slo.share:.0%} have TTFT <= "
        f"{now.ttft_s:.3g} s and <= {now.tpot_s * 1e3:.3g} ms per token",
        f"busy         prefill {now.prefill_busy:.0%} of the time; decode KV {now.decode_kv:.0%}, "
        f"batch {now.decode_batch:.0%}",
        f"carries      {answer.carries:.2f} times this load; then {answer.bottleneck}",
        "",
        "Share within the SLO with one replica less or more, under the planned load:",
        "",
        *_table(answer),
    ]
    if question.assumed:
        lines += ["", "Assumed, as nobody gave or measured it: " + "; ".join(question.assumed)]
    return "\n".join(lines)


def _table(answer: Answer) -> list[str]:
    fleets = list(answer.sensitivity)
    decodes = sorted({each.decode for each in fleets})
    rows = ["".join(["              ", *(f"{count:>5} decode" for count in decodes)])]
    for prefill in sorted({each.prefill for each in fleets}):
        row = f"{prefill:>5} prefill "
        for count in decodes:
            near = Fleet(prefill=prefill, decode=count)
            mark = "*" if near == answer.fleet else " "
            row += f"{answer.sensitivity[near].good:>11.1%}{mark}"
        rows.append(row)
    return rows
