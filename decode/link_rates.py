"""How KV comes from each prefill worker: how fast, as READs show, and if at all, as tests show.

Fed by the importer. Invariant: a worker has metric series only while a link to it is up or its test
fails. Its rate outlives the link, so
that routers go on knowing it; the first READ over a new link replaces it.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from statistics import median

from decode.metrics import ImportMetrics
from rpc.v1 import worker_pb2

log = logging.getLogger(__name__)

MAX_WORKERS = 1024
"""Prefill workers remembered; those measured longest ago are forgotten."""
RATE_BYTES = 1 << 20
"""A READ of fewer bytes shows latency more than rate; it counts while no larger one was seen.

Source: own judgement: at 10 GB/s 1 MiB takes 0.1 ms, several times what it takes to post a READ.
"""
NEWEST_SHARE = 0.25
"""Weight of the newest READ in the mean."""
SLOW_RATIO = 0.25
"""A link slower than this share of the other links' median is warned of."""
MAX_TEXT_CHARS = 512
_MIN_OTHERS = 2


@dataclass(slots=True)
class _Pair:
    """This worker and one prefill worker. Rate and latency are 0 until measured."""

    links: int = 0
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    largest_read: int = 0
    """Bytes of the largest READ over the newest link."""
    warned: bool = False
    told_of_nixl: bool = False


class LinkRates:
    """Every pair of which this decode worker is one half. Single thread."""

    def __init__(
        self, block_bytes: int, metrics: ImportMetrics, *, could_use_nixl: bool = False
    ) -> None:
        """`could_use_nixl`: this worker moves KV by tcp, and NIXL with RDMA would work here."""
        self._block_bytes = block_bytes
        self._could_use_nixl = could_use_nixl
        self._metrics = metrics
        self._pairs: OrderedDict[str, _Pair] = OrderedDict()
        self._worker_of: dict[str, str] = {}
        """Peer, which is one link, to worker."""
        self._failing: dict[str, tuple[int, str]] = {}
        """Worker to epoch and reason, where its latest test failed."""

    def opened(self, peer_id: str, worker_id: str) -> None:
        """A link to a prefill worker is up."""
        pair = self._pairs.setdefault(worker_id, _Pair())
        self._worker_of[peer_id] = worker_id
        pair.links += 1
        pair.latency_s = 0.0
        pair.largest_read = 0
        pair.warned = False
        unused = [worker for worker, pair in self._pairs.items() if not pair.links]
        for worker in unused[: max(0, len(self._pairs) - MAX_WORKERS)]:
            del self._pairs[worker]

    def met(self, worker_id: str, could_use_nixl: bool) -> None:
        """A prefill worker said whether it is as this one is; told once if both could do better."""
        pair = self._pairs.get(worker_id)
        if pair is None or pair.told_of_nixl or not (self._could_use_nixl and could_use_nixl):
            return
        pair.told_of_nixl = True
        log.warning(
            "KV comes from prefill worker %s by %s, though both workers could use NIXL with RDMA: "
            "set kv_transport to auto or nixl on both",
            worker_id,
            self._metrics.transport,
        )

    def tested(self, worker_id: str, epoch: int, failure: str | None) -> None:
        """See `kvtransfer.actions.LinkTested`."""
        failed_before = self._failing.pop(worker_id, None) is not None
        if failure:
            log.error(
                "KV does not move from prefill worker %s by %s, so none is handed over: %s "
                "(tested again from time to time)",
                worker_id,
                self._metrics.transport,
                failure,
            )
            self._failing[worker_id] = (epoch, failure)
        elif failure is not None:
            log.log(
                logging.WARNING if failed_before else logging.INFO,
                "KV moves from prefill worker %s by %s",
                worker_id,
                self._metrics.transport,
            )
        self._show_test(worker_id)

    def closed(self, peer_id: str) -> None:
        """It is not any more. Nothing to do for an unknown one."""
        worker_id = self._worker_of.pop(peer_id, None)
        if worker_id is None:
            return
        pair = self._pairs[worker_id]
        pair.links -= 1
        if not pair.links:
            self._metrics.link_closed(worker_id)
            self._show_test(worker_id)

    def _show_test(self, worker_id: str) -> None:
        failing = worker_id in self._failing
        if failing or worker_id in self._worker_of.values():
            self._metrics.link_tested(worker_id, failing)
        else:
            self._metrics.link_closed(worker_id)

    def read(self, peer_id: str, num_blocks: int, duration_s: float) -> None:
        """A READ of so many blocks took so long."""
        worker_id = self._worker_of.get(peer_id)
        if worker_id is None or duration_s <= 0:
            return
        pair = self._pairs[worker_id]
        self._pairs.move_to_end(worker_id)
        num_bytes = num_blocks * self._block_bytes
        self._metrics.link_read(worker_id, num_bytes, duration_s)
        if num_blocks == 1:
            pair.latency_s = min(pair.latency_s or duration_s, duration_s)
        if num_bytes < min(RATE_BYTES, pair.largest_read):
            return
        rate = num_bytes / duration_s
        if pair.largest_read < min(RATE_BYTES, num_bytes):
            pair.bytes_per_s = rate
        else:
            pair.bytes_per_s += NEWEST_SHARE * (rate - pair.bytes_per_s)
        pair.largest_read = max(pair.largest_read, num_bytes)
        self._metrics.link_measured(worker_id, pair.bytes_per_s, pair.latency_s)
        if pair.largest_read >= RATE_BYTES and not pair.warned:
            self._judge(worker_id, pair)

    def _judge(self, worker_id: str, pair: _Pair) -> None:
        """Warn, once per link, if it is much slower than the others."""
        others = [
            other.bytes_per_s
            for other in self._pairs.values()
            if other is not pair and other.bytes_per_s
        ]
        if len(others) < _MIN_OTHERS or pair.bytes_per_s >= SLOW_RATIO * median(others):
            return
        pair.warned = True
        log.warning(
            "KV comes from prefill worker %s at %.3g GB/s, from the others at %.3g GB/s: has its "
            "transport (%s) fallen back to a slow path, say to a plain network?",
            worker_id,
            pair.bytes_per_s / 1e9,
            median(others) / 1e9,
            self._metrics.transport,
        )

    def report(self) -> list[worker_pb2.LinkRate]:
        """What routers are told."""
        links = {
            worker_id: worker_pb2.LinkRate(
                prefill_worker_id=worker_id,
                bytes_per_s=pair.bytes_per_s,
                latency_s=pair.latency_s,
            )
            for worker_id, pair in self._pairs.items()
            if pair.bytes_per_s
        }
        for worker_id, (epoch, failure) in self._failing.items():
            link = links.setdefault(worker_id, worker_pb2.LinkRate(prefill_worker_id=worker_id))
            link.failure, link.prefill_epoch = failure[:MAX_TEXT_CHARS], epoch
        return list(links.values())
