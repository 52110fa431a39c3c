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
    """When each pair may be probed next."""

    def __init__(self, own: Hello, config: HandoverConfig) -> None:
        """`own` is this worker's hello."""
        self._own = own
        self._config = config
        self._count = 0
        self._due_at: OrderedDict[tuple[str, int], float] = OrderedDict()
        """By worker and epoch, for links open and closed."""

    def start(self, link: PeerLink, now: float) -> Handover | None:
        """A probe of this link, if one is due and the link is up and unused."""
        config = self._config
        if link.hello is None or link.keys:
            return None
        count = min(config.probe_blocks, link.hello.num_blocks // config.probe_share)
        due_at = self._due_at.get((link.worker_id, link.epoch), now)
        holds = link.holds_since(now, now + config.read_margin_s)
        if count < 1 or now < due_at or not holds:
            return None
        self._wait(link, now + min(config.probe_retry_s, config.probe_interval_s))
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

    def measured(self, probe: Handover, now: float) -> ProbeEnded:
        """A probe has shown what its link can do: the next one has time."""
        self._wait(probe.link, now + self._config.probe_interval_s)
        return ProbeEnded(probe.key, ProbeOutcome.MEASURED, "")

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
