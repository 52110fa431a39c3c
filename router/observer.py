"""What there is to see of the whole system at one moment: workers, links, recent requests, as JSON.

Made by router/main.py from the fleet and dispatch, read by router/api/observation.py when somebody
asks; it keeps nothing of its own. Seconds, bytes and tokens everywhere; a value that nobody has
measured is null.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from router.fleet.worker import Role, WorkerInfo, WorkerLoad, WorkerStatus
from router.timeline import RequestTimeline

CACHE_WINDOW = 256
"""Latest requests that each worker's cache hit is taken over.

Source: own judgement: enough to be steady, few enough to follow what happens now.
"""


class Statuses(Protocol):
    """What is read of the fleet."""

    @property
    def statuses(self) -> Sequence[WorkerStatus]:
        """Every known worker."""


class Trust(Protocol):
    """What is read of the breakers."""

    def describe(self, key: str | tuple[str, str]) -> Mapping[str, object]:
        """Of a worker, or of a prefill and a decode worker, by address."""


class Recent(Protocol):
    """What is read of dispatch."""

    def recent(self, count: int) -> Sequence[RequestTimeline]:
        """The latest requests, newest first."""


@dataclass(frozen=True, slots=True)
class CacheHit:
    """Prompt tokens that one worker was asked to have in KV, and those it had already."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def plus(self, prompt_tokens: int, cached_tokens: int) -> "CacheHit":
        """With one more request."""
        return CacheHit(
            self.requests + 1,
            self.prompt_tokens + prompt_tokens,
            self.cached_tokens + cached_tokens,
        )


class Observer:
    """Answers what the console and scripts ask of a router."""

    def __init__(self, fleet: Statuses, requests: Recent, trust: Trust) -> None:
        self._fleet = fleet
        self._requests = requests
        self._trust = trust

    def fleet(self) -> dict[str, object]:
        """Every worker with its load, and every link from a prefill to a decode worker."""
        statuses = self._fleet.statuses
        hits = cache_hits(self._requests.recent(CACHE_WINDOW))
        return {
            "object": "fleet",
            "workers": [
                _worker(status, hits) | {"breaker": self._trust.describe(status.address)}
                for status in statuses
            ],
            "links": _links(statuses, self._trust),
        }

    def requests(self, count: int) -> list[dict[str, object]]:
        """At most `count` requests, newest first; each sequence of a request is one of them."""
        return [timeline.summary() for timeline in self._requests.recent(count)]


def cache_hits(timelines: Sequence[RequestTimeline]) -> dict[str, CacheHit]:
    """What the prefix cache of each worker spared, by worker id, over attempts that have ended."""
    hits: dict[str, CacheHit] = {}
    for timeline in timelines:
        for worker_id, cached_tokens in timeline.cached_by_worker():
            hit = hits.get(worker_id, CacheHit())
            hits[worker_id] = hit.plus(len(timeline.request.prompt_ids), cached_tokens)
    return hits


def _worker(status: WorkerStatus, hits: Mapping[str, CacheHit]) -> dict[str, object]:
    shown: dict[str, object] = {
        "address": status.address,
        "role": status.role,
        "pool": status.pool or None,
        "state": status.state,
        "cause": status.cause or None,
    }
    info, load = status.info, status.load
    if info is None:
        return shown
    hit = hits.get(info.worker_id, CacheHit())
    return shown | {
        "worker_id": info.worker_id,
        "model": info.model,
        "running": load.running,
        "waiting": load.waiting,
        "max_num_seqs": info.max_num_seqs,
        "backlog_tokens": load.backlog_tokens,
        "kv": {
            "num_blocks": info.num_blocks,
            "held_blocks": load.held_blocks,
            "cached_blocks": load.cached_blocks,
            "block_size": info.layout.block_size,
            "block_bytes": info.layout.block_bytes,
            "leases": load.leases,
        },
        "cache_hit": {
            "requests": hit.requests,
            "prompt_tokens": hit.prompt_tokens,
            "cached_tokens": hit.cached_tokens,
        },
        "prefill_tokens_per_s": load.prefill_tokens_per_s or None,
        "decode_step_s": load.decode_step_s or None,
        "host_bytes_per_s": load.host_bytes_per_s or None,
        "heartbeat_age_s": load.heartbeat_age_s,
    }


def _links(statuses: Sequence[WorkerStatus], trust: Trust) -> list[dict[str, object]]:
    attached = [(status, status.info) for status in statuses if status.info is not None]
    return [
        {
            "prefill": source.worker_id,
            "decode": target.worker_id,
            "bytes_per_s": here.load.link_bytes_per_s.get(source.worker_id),
            "latency_s": here.load.link_latency_s.get(source.worker_id),
            "transport": here.load.transport or None,
            "failure": _failure(source, here.load),
            "breaker": trust.describe((there.address, here.address)),
        }
        for there, source in attached
        if source.role is Role.PREFILL
        for here, target in attached
        if target.role is Role.DECODE
    ]


def _failure(source: WorkerInfo, load: WorkerLoad) -> str | None:
    found = load.link_failures.get(source.worker_id)
    return found.cause if found is not None and found.epoch == source.epoch else None
