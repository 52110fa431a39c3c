"""What a running system says of its load and its replicas, read from a router or from Prometheus.

Values that nobody has measured yet are None. Nothing here decides anything: facts in, facts out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from core.errors import UnavailableError

TIMEOUT_S = 10.0
_PREFILL, _DECODE = "diptych_kv_leases", "diptych_kv_transfers_inflight"
"""Metrics that workers of one role have and those of the other lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A load and the replicas that carry it."""

    rate: float | None = None
    """Sequences per second."""
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    hit_ratio: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_step_s: float | None = None
    """At `decode_batch` sequences."""
    decode_batch: float | None = None
    max_num_seqs: int | None = None
    kv_tokens: int | None = None
    kv_bytes_per_token: float | None = None
    link_bytes_per_s: float | None = None
    prefill_replicas: int | None = None
    decode_replicas: int | None = None


def watch_router(
    client: httpx.Client, watch_s: float, wait: Callable[[float], None] = time.sleep
) -> Measured:
    """Read a router's counters twice, `watch_s` apart, and its fleet.

    Raises:
        UnavailableError: it can't be reached, or does not answer as a router.
    """
    before = _counters(_get(client, "/metrics").text)
    wait(watch_s)
    after = _counters(_get(client, "/metrics").text)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    count = grown.get("diptych_router_generations_total", 0.0)
    load = Measured()
    if count > 0:
        load = Measured(
            rate=count / watch_s,
            prompt_tokens=grown.get("diptych_router_prompt_tokens_total", 0.0) / count,
            output_tokens=grown.get("diptych_router_generation_tokens_total", 0.0) / count,
        )
    try:
        return of_fleet(_get(client, "/v1/fleet").json(), load)
    except (KeyError, TypeError, ValueError) as error:
        raise UnavailableError(
            f"{client.base_url} does not answer as a router: {error!r}"
        ) from None


def of_fleet(fleet: Mapping[str, Any], load: Measured) -> Measured:
    """Add what /v1/fleet says of the replicas to a measured load."""
    ready = [each for each in fleet["workers"] if each["state"] == "ready"]
    pools: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
    for worker in ready:
        pools[worker["role"]].append(worker)
    computing = pools["prefill"] or pools["decode"]
    decoding = [each for each in pools["decode"] if each["decode_step_s"]]
    hits = [each["cache_hit"] for each in computing]
    prompts = sum(hit["prompt_tokens"] for hit in hits)
    kv = [each["kv"] for each in pools["decode"]]
    links = [each["bytes_per_s"] for each in fleet["links"] if each["bytes_per_s"]]
    return Measured(
        rate=load.rate,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        hit_ratio=sum(hit["cached_tokens"] for hit in hits) / prompts if prompts else None,
        prefill_tokens_per_s=_mean([each["prefill_tokens_per_s"] for each in computing]),
        decode_step_s=_mean([each["decode_step_s"] for each in decoding]),
        decode_batch=_mean([each["running"] for each in decoding], zeros=True),
        max_num_seqs=max((each["max_num_seqs"] for each in pools["decode"]), default=None),
        kv_tokens=min((each["num_blocks"] * each["block_size"] for each in kv), default=None),
        kv_bytes_per_token=_mean([each["block_bytes"] / each["block_size"] for each in kv]),
        link_bytes_per_s=_mean(links),
        prefill_replicas=len(pools["prefill"]),
        decode_replicas=len(pools["decode"]),
    )


def ask_prometheus(client: httpx.Client, window_s: float) -> Measured:
    """The busiest five minutes of the last `window_s`, and what the workers measured.

    Raises:
        UnavailableError: it can't be reached, or refuses a query.
    """

    def one(query: str) -> float | None:
        found = _query(client, query)
        value = float(found[0]["value"][1]) if found else None
        return value if value is not None and value == value else None  # NaN is no value

    def rate_of(metric: str, role: str = "") -> str:
        return f"sum(rate({metric}[5m]){' and on (instance) ' + role if role else ''})"

    def of(metric: str, role: str) -> str:
        return f"({metric} and on (instance) {role})"

    window = f"{int(window_s)}s"
    generations = rate_of("diptych_router_generations_total")
    hits = rate_of("diptych_prefix_cache_hit_tokens_total", _PREFILL)
    looked_up = rate_of("diptych_prefix_cache_lookup_tokens_total", _PREFILL)
    config = _query(client, of("diptych_cache_config_info", _DECODE))
    sizes = [int(c["metric"]["block_size"]) * int(c["metric"]["num_blocks"]) for c in config]
    seqs = one(f"max{of('diptych_max_num_seqs', _DECODE)}")
    return Measured(
        rate=one(f"max_over_time({generations}[{window}:1m])"),
        prompt_tokens=one(f"{rate_of('diptych_router_prompt_tokens_total')} / {generations}"),
        output_tokens=one(f"{rate_of('diptych_router_generation_tokens_total')} / {generations}"),
        hit_ratio=one(f"{hits} / {looked_up}"),
        prefill_tokens_per_s=one(f"avg{of('diptych_prefill_tokens_per_second > 0', _PREFILL)}"),
        decode_step_s=one(f"avg{of('diptych_decode_step_seconds > 0', _DECODE)}"),
        decode_batch=one(f"avg{of('diptych_requests_running', _DECODE)}"),
        max_num_seqs=None if seqs is None else int(seqs),
        kv_tokens=min(sizes, default=None),
        link_bytes_per_s=one("avg(diptych_kv_link_bytes_per_second > 0)"),
    )


def _mean(values: Sequence[float | None], *, zeros: bool = False) -> float | None:
    known = [value for value in values if value is not None and (value or zeros)]
    return sum(known) / len(known) if known else None


def _counters(text: str) -> dict[str, float]:
    """Every counter, its series added up."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.type == "counter":
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def _query(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = _get(client, "/api/v1/query", query=query)
    try:
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
    except (KeyError, TypeError, ValueError):
        raise UnavailableError(f"{client.base_url} does not answer as a Prometheus.") from None
    return found


def _get(client: httpx.Client, path: str, **params: str) -> httpx.Response:
    try:
        response = client.get(path, params=params)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise UnavailableError(f"{client.base_url.join(path)} can't be read: {error}") from None
    return response
