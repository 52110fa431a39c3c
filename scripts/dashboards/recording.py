"""Recording rules: what panels and alerts, or autoscalers, both ask for.

Names are `diptych:<what>:<how>`. Every rule keeps the labels namespace and release, so that several
installations in one Prometheus stay apart; where a scrape adds neither, all is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.dashboards.family import Family
from scripts.dashboards.promql import Source, Vector
from scripts.dashboards.registry import Catalogue

RELEASE = ("namespace", "release")
SLO_WINDOWS = ("5m", "30m", "1h", "6h")


@dataclass(frozen=True, slots=True)
class Recording:
    """One rule."""

    name: str
    vector: Vector
    meaning: str

    @property
    def family(self) -> Family:
        """What it looks like to who asks for it."""
        return Family(
            name=self.name,
            kind="recorded",
            meaning=self.meaning,
            values={},
            scraped=self.vector.labels,
        )


def recordings(catalogue: Catalogue) -> list[Recording]:
    """Every recording rule, over metrics of the catalogue."""
    source = Source(catalogue, "5m")
    return [*_of_routers(source), *_of_workers(source)]


def with_recordings(catalogue: Catalogue, rules: Sequence[Recording]) -> Catalogue:
    """A catalogue that also knows what the rules compute."""
    return Catalogue({**catalogue.families, **{rule.name: rule.family for rule in rules}})


def _of_routers(source: Source) -> list[Recording]:
    return [
        *(
            Recording(
                f"diptych:slo_missed:ratio_rate{window}",
                _missed(source.over(window)),
                f"Share of sequences that missed a target, over {window}.",
            )
            for window in SLO_WINDOWS
        ),
        Recording(
            "diptych:goodput:rate5m",
            source.rate("diptych_router_slo_sequences_total", target="all", outcome="met").sum(
                *RELEASE
            ),
            "Sequences per second that met every target.",
        ),
        Recording(
            "diptych:request_errors:ratio_rate5m",
            _share(
                source.rate("diptych_router_requests_total", outcome=f"=~{SERVER_ERRORS}"),
                source.rate("diptych_router_requests_total", outcome="!~disconnected|shutdown"),
            ),
            "Share of requests that failed for a cause that is not their client's.",
        ),
        *(
            Recording(
                f"diptych:{name}_seconds:p99_5m",
                source.quantile(0.99, metric, *RELEASE),
                meaning,
            )
            for name, metric, meaning in (
                (
                    "ttft",
                    "diptych_router_time_to_first_token_seconds",
                    "99th percentile of the time to first token.",
                ),
                (
                    "tpot",
                    "diptych_router_time_per_output_token_seconds",
                    "99th percentile of the mean time per output token.",
                ),
                (
                    "itl",
                    "diptych_router_inter_token_latency_seconds",
                    "99th percentile of the gap between tokens.",
                ),
            )
        ),
        Recording(
            "diptych:disaggregated:ratio_rate5m",
            _share(
                source.rate("diptych_router_routing_total", mode="disaggregated"),
                source.rate("diptych_router_routing_total"),
            ),
            "Share of attempts whose KV moves from a prefill to a decode worker.",
        ),
        Recording(
            "diptych:unattributed:ratio_rate5m",
            _share(
                source.rate("diptych_router_unattributed_seconds_total"),
                source.added("diptych_router_stage_seconds"),
            ),
            "Share of the time of generations that no stage explains.",
        ),
    ]


def _of_workers(source: Source) -> list[Recording]:
    pool = (*RELEASE, "role", "pool")
    return [
        Recording(
            "diptych:prefill_backlog_seconds",
            source.now("diptych_backlog_tokens").sum(*pool, "worker")
            / (source.now("diptych_prefill_tokens_per_second") > 0).sum(*pool, "worker"),
            "Prompts that a worker has accepted and not computed, by its own measured rate.",
        ),
        Recording(
            "diptych:kv_usage:ratio",
            source.now("diptych_kv_blocks", state="held").sum(*pool)
            / source.now("diptych_kv_blocks").sum(*pool),
            "Share of a pool's KV blocks that are held.",
        ),
        Recording(
            "diptych:prefix_cache_hit:ratio_rate5m",
            source.rate("diptych_prefix_cache_hit_tokens_total").sum(*pool)
            / (source.rate("diptych_prefix_cache_lookup_tokens_total").sum(*pool) > 0),
            "Share of prompt tokens looked up that the prefix cache had, tiers below it included.",
        ),
        Recording(
            "diptych:kv_transfer_failed:ratio_rate5m",
            _failed_transfers(source),
            "Share of hand-overs that ended without their KV.",
        ),
    ]


SERVER_ERRORS = "|".join(
    (
        *("internal", "unavailable", "overloaded", "deadline_exceeded", "worker_lost"),
        *("kv_transfer_failed", "invalid_config"),
    )
)
"""Outcomes of requests that are no fault of the client's."""


def _missed(source: Source) -> Vector:
    name = "diptych_router_slo_sequences_total"
    by = (*RELEASE, "target")
    return source.rate(name, outcome="missed").sum(*by) / (source.rate(name).sum(*by) > 0)


def _share(part: Vector, whole: Vector) -> Vector:
    return part.sum(*RELEASE) / (whole.sum(*RELEASE) > 0)


def _failed_transfers(source: Source) -> Vector:
    failed = source.rate("diptych_kv_transfer_failures_total").sum(*RELEASE)
    done = source.observed("diptych_kv_transfer_duration_seconds").sum(*RELEASE)
    return failed / (failed + done > 0)
