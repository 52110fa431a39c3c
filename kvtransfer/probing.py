"""When decode tests and measures a link, and how that ends. Used by `handover.py` and its book.

A probe is a hand-over that delivers nothing: it READs leased blocks, of which the first is stamped,
while its link is otherwise unused, and gives way at once to a prompt. Its key ends in ProbeEnded,
whatever happens.

The first probe of each link is its test: one block, which hand-overs wait for and do not preempt.
Until it came as it was sent nothing else is read; a test that fails ends its link, and the pair is
tested again from time to time. Where a side has no block to spare the link goes untested.
"""

from collections import OrderedDict
from dataclasses import dataclass

from core.errors import ErrorCode
from kvtransfer.actions import Fail, HandoverAction, LinkTested, ProbeEnded, ProbeOutcome
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.handover_record import Handover
from kvtransfer.messages import Hello, Key
from kvtransfer.peer_link import PeerLink

MAX_PROBED = 4096
"""Workers remembered as probed; one beyond that is probed again whenever its link opens."""
RETEST_S = 1.0
"""After a test that failed for the first time; each further one waits twice as long."""
RETEST_MAX_S = 30.0

Pair = tuple[str, int]
"""Worker and epoch."""


@dataclass(slots=True)
class _Failing:
    """A pair whose latest test failed."""

    address: str
    retry_at: float
    wait_s: float = RETEST_S


class ProbeSchedule:
    """When each pair may be probed next, and which have failed their test."""

    def __init__(self, own: Hello, config: HandoverConfig) -> None:
        """`own` is this worker's hello."""
        self._own = own
        self._config = config
        self._count = 0
        self._due_at: OrderedDict[Pair, float] = OrderedDict()
        """For links open and closed."""
        self._failing: dict[Pair, _Failing] = {}

    def start(self, link: PeerLink, now: float) -> Handover | None:
        """A probe of this link, if one is due: its test at once, others while it is unused."""
        if link.hello is None or link.probe is not None:
            return None
        if not link.proven:
            return self._probe(link, 1, now + self._config.peer_silence_s)
        config = self._config
        count = min(config.probe_blocks, link.hello.num_blocks // config.probe_share)
        due_at = self._due_at.get((link.worker_id, link.epoch), now)
        holds = link.holds_since(now, now + config.read_margin_s)
        if count < 1 or link.keys or now < due_at or not holds:
            return None
        self._wait(link, now + min(config.probe_retry_s, config.probe_interval_s))
        return self._probe(link, count, now + config.read_timeout_s)

    def _probe(self, link: PeerLink, count: int, deadline: float) -> Handover:
        self._count += 1
        return Handover(
            Key(f"probe/{self._own.epoch:x}/{self._count}", 0),
            link,
            num_tokens=count * self._own.layout.block_size,
            num_blocks=count,
            deadline=deadline,
            claimed=True,
            probe=True,
        )

    def succeeded(self, probe: Handover, now: float) -> list[HandoverAction]:
        """A probe has shown what its link can do."""
        link = probe.link
        ended = ProbeEnded(probe.key, ProbeOutcome.MEASURED, "")
        if link.proven:
            self._wait(link, now + self._config.probe_interval_s)
            return [ended]
        link.prove()
        self._failing.pop((link.worker_id, link.epoch), None)
        return [ended, LinkTested(link.worker_id, link.epoch, "")]

    def doubt(self, probe: Handover, fail: Fail | None) -> str:
        """What this end of a probe says against its link; empty: nothing."""
        link = probe.link
        if link.proven or fail is None:
            return ""
        if fail.code is ErrorCode.OVERLOADED:
            link.prove()
            return ""
        return f"No test block came from {link.worker_id}: {fail.message}"

    def dropped(
        self, link: PeerLink, code: ErrorCode, message: str, now: float
    ) -> list[HandoverAction]:
        """A link ends; if it could not be tested though its worker is there, that is remembered."""
        pair = (link.worker_id, link.epoch)
        if not link.proven and link.hello is not None and code is ErrorCode.KV_TRANSFER:
            failing = self._failing.setdefault(pair, _Failing(link.address, now))
            failing.retry_at = now + failing.wait_s
            failing.wait_s = min(2 * failing.wait_s, RETEST_MAX_S)
            return [LinkTested(link.worker_id, link.epoch, message)]
        if self._failing.pop(pair, None) is None:
            return []
        return [LinkTested(link.worker_id, link.epoch, None)]

    def retests(self, now: float) -> list[tuple[str, int, str]]:
        """Worker, epoch and address of the pairs that it is time to test again."""
        due = {pair: each for pair, each in self._failing.items() if each.retry_at <= now}
        for failing in due.values():
            failing.retry_at = now + failing.wait_s
        return [(*pair, failing.address) for pair, failing in due.items()]

    def _wait(self, link: PeerLink, due_at: float) -> None:
        pair = (link.worker_id, link.epoch)
        self._due_at[pair] = due_at
        self._due_at.move_to_end(pair)
        if len(self._due_at) > MAX_PROBED:
            self._due_at.popitem(last=False)


def probe_ended(key: Key, fail: Fail | None) -> ProbeEnded:
    """What a probe's end is called that a prompt's would be a Fail, or None: it was taken back."""
    if fail is None:
        return ProbeEnded(key, ProbeOutcome.PREEMPTED, "A prompt came.")
    refused = fail.code is ErrorCode.OVERLOADED
    return ProbeEnded(key, ProbeOutcome.REFUSED if refused else ProbeOutcome.FAILED, fail.message)
