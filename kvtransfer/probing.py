"""When decode measures a link, and how that ends. Used by `handover.py` only.

A probe is a hand-over that delivers nothing: it READs leased blocks of no content while its link is
otherwise unused, and gives way at once to a prompt. Its key ends in ProbeEnded, whatever happens.
"""

from collections import OrderedDict

from core.errors import ErrorCode
from kvtransfer.actions import Fail, ProbeEnded, ProbeOutcome
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.handover_record import Handover
from kvtransfer.messages import Hello, Key
from kvtransfer.peer_link import PeerLink

MAX_PROBED = 4096
"""Workers remembered as probed; one beyond that is probed again whenever its link opens."""


class ProbeSchedule:
    """Which pairs were probed, and when."""

    def __init__(self, own: Hello, config: HandoverConfig) -> None:
        """`own` is this worker's hello."""
        self._own = own
        self._config = config
        self._count = 0
        self._probed_at: OrderedDict[tuple[str, int], float] = OrderedDict()
        """Worker and epoch to when it was probed last, for links open and closed."""

    def start(self, link: PeerLink, now: float) -> Handover | None:
        """A probe of this link, if one is due and the link is up and unused."""
        config, pair = self._config, (link.worker_id, link.epoch)
        if link.hello is None or link.keys:
            return None
        count = min(config.probe_blocks, link.hello.num_blocks // config.probe_share)
        due_at = self._probed_at.get(pair, float("-inf")) + config.probe_interval_s
        holds = link.holds_since(now, now + config.read_margin_s)
        if count < 1 or now < due_at or not holds:
            return None
        self._probed_at[pair] = now
        self._probed_at.move_to_end(pair)
        if len(self._probed_at) > MAX_PROBED:
            self._probed_at.popitem(last=False)
        self._count += 1
        return Handover(
            Key(f"probe/{self._own.epoch:x}/{self._count}", 0),
            link,
            num_tokens=count * self._own.layout.block_size,
            num_blocks=count,
            deadline=now + config.read_timeout_s,
            claimed=True,
            probe=True,
        )


def probe_ended(key: Key, fail: Fail | None) -> ProbeEnded:
    """What a probe's end is called that a prompt's would be a Fail, or None: it was taken back."""
    if fail is None:
        return ProbeEnded(key, ProbeOutcome.PREEMPTED, "A prompt came.")
    refused = fail.code is ErrorCode.OVERLOADED
    return ProbeEnded(key, ProbeOutcome.REFUSED if refused else ProbeOutcome.FAILED, fail.message)
