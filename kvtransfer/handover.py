"""Decode's half of the hand-over: when to read which KV blocks, and when what was read may be used.

The engine loop of decode feeds it events and carries out the actions that it returns; it has no
clock and no I/O. In each turn: first the messages and the READs that ended, then `tick`. There is
one record per prompt whose KV comes from a prefill worker (`handover_record.py`) and one per link
to such a worker (`peer_link.py`); both say what they allow. Which there are, and what ends with
them, is up to the book (`handover_book.py`).

Invariants: a prompt is delivered only if its Commit fits, every block was read or cached here, and
the lease held without a gap from before the first READ until now; every key ends once, in Deliver,
in Fail, or silently after `aborted`; blocks are dropped and claims released only when no READ is
pending into them; any doubt is a Fail, which the router cures by another attempt.
A probe is a record too; it ends in ProbeEnded (see `probing.py`).

Course of a record:
    waiting for the link -> claimed -> offered (lease known) -> reserved -> reading -> delivered
    from anywhere: ended, which lasts while a READ is pending
"""

from collections import Counter

from core.errors import ErrorCode
from kvtransfer.actions import (
    ConnectPeer,
    DropBlocks,
    Fail,
    HandoverAction,
    Reserve,
    ReserveScratch,
    Send,
)
from kvtransfer.handover_book import HandoverBook
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.handover_record import Handover
from kvtransfer.messages import (
    Claim,
    Commit,
    Hello,
    Key,
    Offer,
    PrefillMessage,
    Probe,
    Progress,
    Refused,
    Release,
    Renew,
    Renewed,
    Revoke,
)
from kvtransfer.peer_link import PeerLink
from kvtransfer.probing import ProbeSchedule


class HandoverMachine:
    """Every hand-over to one decode worker. Single thread; `now` never goes back."""

    def __init__(self, own: Hello, config: HandoverConfig | None = None) -> None:
        """`own` is what this worker says to each prefill worker."""
        self._own = own
        self._config = config or HandoverConfig()
        self._probes = ProbeSchedule(own, self._config)
        self._book = HandoverBook(own, self._config, self._probes)
        self._next_read = 1
        self.counters: Counter[str] = Counter()
        """How often something out of the ordinary was ignored or went wrong, by cause."""

    @property
    def num_handovers(self) -> int:
        """Hand-overs not over yet, ended ones with a pending READ included."""
        return len(self._book.handovers)

    @property
    def num_awaited_blocks(self) -> int:
        """Blocks of prompts that are to come and have been given none yet."""
        return sum(
            handover.num_blocks
            for handover in self._book.handovers.values()
            if handover.table is None and not handover.ended and not handover.probe
        )

    @property
    def num_inflight_blocks(self) -> int:
        """Blocks being read now."""
        return sum(link.inflight_blocks for link in self._book.links.values())

    @property
    def num_links(self) -> int:
        """Links open or opening."""
        return len(self._book.links)

    # What the router asks for and the engine answers.

    def submitted(
        self,
        key: Key,
        *,
        worker_id: str,
        epoch: int,
        address: str,
        num_tokens: int,
        deadline: float,
        now: float,
    ) -> list[HandoverAction]:
        """Fetch the KV of a prompt of `num_tokens` tokens from that lifetime of a worker."""
        if key in self._book.handovers:
            self.counters["duplicate_submit"] += 1
            return []
        link, actions = self._book.link_to(worker_id, epoch, address, now)
        if link.probe is not None and link.proven:
            actions += self._book.end(link.probe, None, now)
        num_blocks = -(-num_tokens // self._own.layout.block_size)
        handover = Handover(key, link, num_tokens, num_blocks, deadline)
        self._book.add(handover)
        if link.hello is not None:
            actions += self._claim(handover)
        return actions

    def aborted(self, key: Key, now: float) -> list[HandoverAction]:
        """The router takes the request back; it ends without a word."""
        return self._book.end(key, None, now)

    def failed(self, key: Key, code: ErrorCode, message: str, now: float) -> list[HandoverAction]:
        """The engine can't take the request, for instance because it never fits the pool."""
        return self._book.end(key, Fail(key, code, message), now)

    def reserved(
        self, key: Key, block_table: tuple[int, ...], num_cached_blocks: int, now: float
    ) -> list[HandoverAction]:
        """Answer to Reserve: own blocks for the whole prompt, and how many leading ones hold it."""
        handover = self._book.handovers.get(key)
        if handover is None or handover.ended or handover.table is not None:
            self.counters["late_reserve"] += 1
            return [] if handover else [DropBlocks(key)]
        assert len(block_table) >= handover.num_blocks, "a reservation covers the whole prompt"
        assert 0 <= num_cached_blocks <= handover.num_blocks
        handover.table = block_table
        handover.num_cached = handover.next_block = num_cached_blocks
        return self._pump(handover.link, now)

    # What the transport reports.

    def read_done(
        self, key: Key, read_no: int, now: float, duration_s: float = 0.0
    ) -> list[HandoverAction]:
        """All blocks of a READ are here. `now` was taken after the look that showed it."""
        handover = self._end_read(key, read_no)
        if handover is None:
            return []
        handover.last_read_at = now
        handover.enough = duration_s >= self._config.probe_read_s
        actions = self._book.finish(handover, now) if handover.ended else []
        return actions + self._pump(handover.link, now)

    def read_failed(self, key: Key, read_no: int, message: str, now: float) -> list[HandoverAction]:
        """A READ ended without its blocks, or could not start. The whole peer is in doubt."""
        handover = self._end_read(key, read_no)
        if handover is None:
            return []
        self.counters["failed_read"] += 1
        reason = f"Reading KV blocks from {handover.link.worker_id} failed: {message}"
        return self._book.drop_link(handover.link, ErrorCode.KV_TRANSFER, reason, now)

    def peer_failed(self, link: int, message: str, now: float) -> list[HandoverAction]:
        """The transport could not connect."""
        state = self._book.links.get(link)
        if state is None:
            return []
        reason = f"Can't reach the KV blocks of {state.worker_id}: {message}"
        return self._book.drop_link(state, ErrorCode.KV_TRANSFER, reason, now)

    # What links report.

    def received(self, link: int, message: PrefillMessage, now: float) -> list[HandoverAction]:
        """A message arrived on a link."""
        state = self._book.links.get(link)
        if state is None:
            self.counters["message_on_closed_link"] += 1
            return []
        match message:
            case Hello():
                return self._hello(state, message, now)
            case Refused(reason):
                return self._book.drop_link(state, ErrorCode.KV_TRANSFER, reason, now)
            case Offer():
                return self._offered(state, message, now)
            case Progress():
                return self._progressed(state, message, now)
            case Commit():
                return self._committed(state, message, now)
            case Revoke():
                return self._revoked(state, message, now)
            case Renewed(seq):
                return self._renewed(state, seq, now)

    def link_closed(self, link: int, reason: str, now: float) -> list[HandoverAction]:
        """A link ended or could not be opened."""
        state = self._book.links.get(link)
        if state is None:
            return []
        message = f"The link to prefill worker {state.worker_id} closed: {reason}"
        return self._book.drop_link(state, ErrorCode.WORKER_LOST, message, now, dead=True)

    def tick(self, now: float) -> list[HandoverAction]:
        """Do what time asks for: renew, and give up what is late."""
        actions: list[HandoverAction] = []
        for pair in self._probes.retests(now):
            actions += self._book.link_to(*pair, now)[1]
        for link in list(self._book.links.values()):
            actions += self._tick_link(link, now)
        for handover in list(self._book.handovers.values()):
            if not handover.ended and handover.deadline <= now:
                message = f"The KV of {handover.key.request_id} did not arrive within its deadline."
                fail = Fail(handover.key, ErrorCode.DEADLINE, message)
                actions += self._book.end(handover.key, fail, now)
        return actions

    # Rules of links.

    def _hello(self, link: PeerLink, hello: Hello, now: float) -> list[HandoverAction]:
        fault = link.hello_fault(self._own, hello, self._config)
        if fault:
            return self._book.drop_link(link, ErrorCode.KV_TRANSFER, fault, now)
        link.hello = hello
        link.idle_since = now
        actions: list[HandoverAction] = [
            Send(link.number, Renew(link.next_renew(now))),
            ConnectPeer(link.number, link.peer_id, hello),
        ]
        for handover in self._book.on(link):
            actions += self._claim(handover)
        return actions

    def _renewed(self, link: PeerLink, seq: int, now: float) -> list[HandoverAction]:
        if not link.renewed(seq):
            self.counters["late_renewed"] += 1
            return []
        actions: list[HandoverAction] = []
        for handover in self._book.on(link):
            if not handover.ended and handover.first_read_at < link.valid_since:
                self.counters["lapsed_lease"] += 1
                key = handover.key
                message = f"The lease of {key.request_id} lapsed while its blocks were read."
                actions += self._book.end(key, Fail(key, ErrorCode.KV_TRANSFER, message), now)
        return actions + self._pump(link, now)

    def _tick_link(self, link: PeerLink, now: float) -> list[HandoverAction]:
        config = self._config
        if link.hello is None:
            if now < link.opened_at + config.open_timeout_s:
                return []
            message = f"Prefill worker {link.worker_id} at {link.address} does not answer."
            return self._book.drop_link(link, ErrorCode.WORKER_LOST, message, now)
        if now >= link.silent_since(now) + config.peer_silence_s:
            self.counters["silent_peer"] += 1
            message = f"Prefill worker {link.worker_id} is silent."
            return self._book.drop_link(link, ErrorCode.WORKER_LOST, message, now)
        for handover in self._book.on(link):
            read = handover.read
            if read is not None and now >= read.started_at + config.read_timeout_s:
                self.counters["stuck_read"] += 1
                message = f"Reading KV blocks from {link.worker_id} takes too long."
                return self._book.drop_link(link, ErrorCode.KV_TRANSFER, message, now)
        if any(key != link.probe for key in link.keys):
            link.idle_since = now
        elif now >= link.idle_since + config.idle_link_s:
            return self._book.drop_link(link, ErrorCode.UNAVAILABLE, "idle", now)
        actions = self._probe(link, now)
        actions += self._pump(link, now) if link.take_proof() else []
        if link.renew_due(now, config.peer_silence_s):
            actions.append(Send(link.number, Renew(link.next_renew(now))))
        return actions

    def _probe(self, link: PeerLink, now: float) -> list[HandoverAction]:
        probe = self._probes.start(link, now)
        if probe is None:
            return []
        self._book.add(probe)
        return [Send(link.number, Probe(probe.key, probe.num_blocks))]

    # Rules of hand-overs.

    def _claim(self, handover: Handover) -> list[HandoverAction]:
        handover.claimed = True
        return [Send(handover.link.number, Claim(handover.key))]

    def _offered(self, link: PeerLink, offer: Offer, now: float) -> list[HandoverAction]:
        handover = self._book.find(link, offer.key)
        if handover is None or handover.ended:
            self.counters["late_offer"] += 1
            return []
        doubt = handover.doubt_of_offer(offer)
        if doubt is not None:
            return self._doubt(handover, doubt, now)
        handover.lease_id = offer.lease_id
        link.leases[offer.lease_id] = offer.key
        return []

    def _progressed(self, link: PeerLink, progress: Progress, now: float) -> list[HandoverAction]:
        handover = self._of_lease(link, progress.lease_id)
        if handover is None:
            return []
        doubt = handover.doubt_of_progress(progress)
        if doubt is not None:
            return self._doubt(handover, doubt, now)
        handover.remote += progress.block_ids
        return self._reserve(handover) + self._pump(link, now)

    def _committed(self, link: PeerLink, commit: Commit, now: float) -> list[HandoverAction]:
        handover = self._of_lease(link, commit.lease_id)
        if handover is None:
            return []
        doubt = handover.doubt_of_commit(commit, self._own.model_digest)
        if doubt is not None:
            return self._doubt(handover, doubt, now)
        handover.commit = commit
        handover.committed_at = now
        return self._pump(link, now)

    def _revoked(self, link: PeerLink, revoke: Revoke, now: float) -> list[HandoverAction]:
        if self._book.find(link, revoke.key) is None:
            self.counters["late_revoke"] += 1
            return []
        try:
            code = ErrorCode(revoke.error_code)
        except ValueError:
            code = ErrorCode.KV_TRANSFER
        return self._book.end(revoke.key, Fail(revoke.key, code, revoke.error_message), now)

    def _reserve(self, handover: Handover) -> list[HandoverAction]:
        if handover.reserve_asked:
            return []
        handover.reserve_asked = True
        if handover.probe:
            return [ReserveScratch(handover.key, handover.num_blocks)]
        return [Reserve(handover.key)]

    def _pump(self, link: PeerLink, now: float) -> list[HandoverAction]:
        """Deliver what is complete and start the READs that may start, in turn among keys."""
        actions: list[HandoverAction] = []
        if link.number not in self._book.links:
            return actions
        for handover in self._book.on(link):
            if handover.complete_at(now):
                actions += self._deliver(handover, now)
                continue
            read = handover.start_read(self._next_read, now, self._config)
            if read is not None:
                self._next_read += 1
                actions.append(read)
        return actions

    def _end_read(self, key: Key, read_no: int) -> Handover | None:
        handover = self._book.handovers.get(key)
        if handover is None or not handover.end_read(read_no):
            self.counters["late_read"] += 1
            return None
        return handover

    def _deliver(self, handover: Handover, now: float) -> list[HandoverAction]:
        if handover.probe:
            handover.ended = True
            return [*self._probes.succeeded(handover, now), *self._book.finish(handover, now)]
        self._book.forget(handover, now)
        return [handover.delivery(), Send(handover.link.number, Release(handover.key))]

    def _doubt(self, handover: Handover, what: str, now: float) -> list[HandoverAction]:
        self.counters["doubt"] += 1
        message = f"The KV of {handover.key.request_id} can't be trusted: {what}."
        return self._book.end(handover.key, Fail(handover.key, ErrorCode.KV_TRANSFER, message), now)

    def _of_lease(self, link: PeerLink, lease_id: int) -> Handover | None:
        key = link.leases.get(lease_id)
        if key is None or self._book.handovers[key].ended:
            self.counters["late_message"] += 1
            return None
        return self._book.handovers[key]
