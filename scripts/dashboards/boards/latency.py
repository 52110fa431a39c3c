"""Panels about times that clients feel, which several dashboards show."""

from scripts.dashboards.panels import Panel, Query, graph
from scripts.dashboards.promql import Source

_METRICS = {
    "ttft": ("Time to first token", "diptych_router_time_to_first_token_seconds"),
    "tpot": ("Time per output token", "diptych_router_time_per_output_token_seconds"),
    "itl": ("Gap between tokens", "diptych_router_inter_token_latency_seconds"),
}


def against_target(
    source: Source, target: str, advice: str, *, runbooks: tuple[str, ...] = ()
) -> Panel:
    """Quantiles of one of ttft, tpot and itl, and its target as it is set."""
    title, metric = _METRICS[target]
    return graph(
        title,
        advice,
        *(
            Query(source.quantile(share, metric), f"p{share * 100:g}")
            for share in (0.5, 0.95, 0.99)
        ),
        target=Query(
            source.now("diptych_router_slo_target_seconds", target=target).max(), "target"
        ),
        unit="s",
        runbooks=runbooks,
    )


def quantiles(
    source: Source, metric: str, *by: str, shares: tuple[float, ...] = (0.5, 0.99), **matchers: str
) -> tuple[Query, ...]:
    """Queries for quantiles of a histogram, by labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return tuple(
        Query(source.quantile(share, metric, *by, **matchers), f"p{share * 100:g} {legend}".strip())
        for share in shares
    )
