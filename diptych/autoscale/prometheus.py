"""Asks a Prometheus how full the pools are, by the queries of docs/autoscaling.md.

Workers of a role are told apart by a metric that those of the other role lack, so that no labels
are needed; `match` keeps other deployments out.
"""

import logging
import math
from collections.abc import Mapping

import httpx

from diptych.autoscale.policy import PoolSignals
from diptych.autoscale.signals import ITL_QUANTILE, Signals, Targets

log = logging.getLogger(__name__)

STALE_S = 60.0
"""Age of the newest sample above which nothing is decided: two scrapes of the usual 30 s."""
_ROLE = {"prefill": "diptych_kv_leases", "decode": "diptych_kv_transfers_inflight"}


def queries(match: str) -> dict[str, str]:
    """PromQL by what it asks for.

    Args:
        match: label matchers that all metrics of this deployment have, as in `namespace="llm"`.
    """

    def series(metric: str, *labels: str) -> str:
        return f"{metric}{{{','.join(filter(None, (match, *labels)))}}}"

    def of(role: str, expression: str) -> str:
        return f"{expression} and on (instance) {series(_ROLE[role])}"

    found = {"age": f"time() - max(timestamp({series('diptych_router_workers')}))"}
    for role in _ROLE:
        ready = series("diptych_router_workers", f'role="{role}"', 'state="ready"')
        found[f"{role} ready"] = f"max({ready})"
        found[f"{role} seen"] = f"count({series(_ROLE[role])})"
    gaps = series("diptych_router_inter_token_latency_seconds_bucket")
    # A worker may show its steps by kind: all of them keep it busy.
    steps = f"rate({series('diptych_step_duration_seconds_sum')}[1m])"
    busy = f"sum by (instance) ({of('prefill', steps)})"
    kv, batch = series("diptych_kv_cache_usage_ratio"), series("diptych_batch_usage_ratio")
    return found | {
        "backlog": f"avg({of('prefill', series('diptych_prefill_backlog_seconds'))})",
        "busy": f"avg({busy})",
        "kv": f"avg({of('decode', kv)})",
        "batch": f"avg({of('decode', batch)})",
        "itl": f"histogram_quantile({ITL_QUANTILE}, sum by (le) (rate({gaps}[1m])))",
    }


def signals_of(values: Mapping[str, float | None], targets: Targets) -> Signals | None:
    """What the answers mean; None if they are too old, or there are none."""
    age, backlog = values["age"], values["backlog"]
    if age is None or age > STALE_S or None in (values["prefill ready"], values["decode ready"]):
        return None

    def ratio(name: str, target: float) -> float | None:
        value = values[name]
        return None if value is None else value / target

    def complete(role: str) -> bool:
        """A worker that is ready and was not scraped may be the full one."""
        return (values[f"{role} seen"] or 0) >= (values[f"{role} ready"] or 0)

    return Signals(
        prefill=PoolSignals(
            ready=int(values["prefill ready"] or 0),
            complete=complete("prefill") and backlog is not None,
            shares={"busy share": ratio("busy", targets.busy)},
            strains={"backlog": ratio("backlog", targets.backlog_s)},
        ),
        decode=PoolSignals(
            ready=int(values["decode ready"] or 0),
            complete=complete("decode"),
            shares={
                "KV occupancy": ratio("kv", targets.kv),
                "batch occupancy": ratio("batch", targets.batch),
            },
            strains={"ITL": ratio("itl", targets.itl_s)},
        ),
    )


class PrometheusSource:
    """Signals from Prometheus. Owned by the loop."""

    def __init__(self, url: str, match: str, targets: Targets, *, timeout_s: float) -> None:
        """Ask the Prometheus at `url` about the deployment that `match` stands for."""
        self._url = url.rstrip("/")
        self._queries = queries(match)
        self._targets = targets
        self._timeout_s = timeout_s

    async def signals(self) -> Signals | None:
        """What the pools are like now; None if Prometheus does not say, or knows nothing new."""
        values: dict[str, float | None] = {}
        try:
            async with httpx.AsyncClient(timeout=self._timeout_s) as client:
                for name, query in self._queries.items():
                    answer = await client.get(f"{self._url}/api/v1/query", params={"query": query})
                    answer.raise_for_status()
                    values[name] = _value(answer.json()["data"]["result"])
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            log.warning("Prometheus at %s does not say how full pools are: %r", self._url, error)
            return None
        found = signals_of(values, self._targets)
        if found is None:
            log.warning("Prometheus at %s has no fresh samples of routers", self._url)
        return found


def _value(result: list[Mapping[str, list[str]]]) -> float | None:
    value = float(result[0]["value"][1]) if result else math.nan
    return None if math.isnan(value) else value
