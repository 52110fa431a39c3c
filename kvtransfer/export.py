"""Prefill's half of the hand-over: which KV blocks are leased to whom, and until when.

The engine loop of prefill feeds it events and carries out the actions that it returns; it has no
clock and no I/O. There is one record (`export_record.py`) per prompt that is computed here for a
decode worker elsewhere, and one per probe of a link, which leases blocks of no content; the book
(`export_book.py`) has them all.

Invariant: a block that came in through `progressed` goes out through FreeBlocks exactly once, and
after its lease was offered not before the lease is over: released, or expired, which is `ttl` after
the latest of the Offer and the link's latest Renew. A Revoke or a closed link does not end a lease,
because decode may still be reading.
"""

from collections import Counter

from core.errors import ErrorCode
from core.tokens import TokenLogprobs
from kvtransfer.actions import (
    CancelPrefill,
    CloseLink,
    ExportAction,
    FreeBlocks,
    ReserveScratch,
    Send,
)
from kvtransfer.export_book import ExportBook
from kvtransfer.export_config import ExportConfig
from kvtransfer.export_record import ClaimLink, Export, ExportState
from kvtransfer.messages import (
    Claim,
    Commit,
    DecodeMessage,
    Hello,
    Key,
    Probe,
    Progress,
    Refused,
    Release,
    Renew,
    Renewed,
    Revoke,
    hello_mismatch,
)


class ExportMachine:
    """Every lease of one prefill worker. Single thread; `now` never goes back."""

    def __init__(self, own: Hello, config: ExportConfig | None = None) -> None:
        """`own` is what the worker answers to a hello; its lease_ttl_s rules every lease here."""
        assert own.lease_ttl_s > 0, "a prefill worker's hello needs a lease ttl"
        self._own = own
        self._ttl_s = own.lease_ttl_s
        self._config = config or ExportConfig()
        self._book = ExportBook(self._config.max_endings)
        self._next_lease_id = 1
        self.counters: Counter[str] = Counter()
        """How often something out of the ordinary was ignored or refused, by cause."""

    @property
    def num_leases(self) -> int:
        """Exports not over yet, offered or not."""
        return len(self._book.exports)

    @property
    def num_held_blocks(self) -> int:
        """Holds that this machine has to give back; a block shared by two leases counts twice."""
        return sum(len(export.blocks) for export in self._book.exports.values())

    # What the engine reports.

    def submitted(
        self, key: Key, decode_worker_id: str, num_tokens: int, now: float, *, router: int = 0
    ) -> list[ExportAction]:
        """A router asks for this prompt of `num_tokens` tokens, to be handed to that worker.

        `router` names its stream, for `router_left`.
        """
        ending = self._book.endings.get(key)
        if ending is not None:
            return [CancelPrefill(key, ending.code, ending.message)]
        if key in self._book.exports:
            self.counters["duplicate_submit"] += 1
            return []
        export = self._book.exports[key] = Export(key, decode_worker_id, num_tokens, router)
        actions: list[ExportAction] = []
        while (link := self._book.take_early_claim(key)) is not None:
            actions += self._offer(export, link, now)
        return actions

    def progressed(self, key: Key, block_ids: list[int], now: float) -> list[ExportAction]:
        """The prompt's next blocks are complete. The caller took one hold on each for this machine.

        Counts blocks from the prompt's first one on, cached ones and a partial last one included.
        """
        export = self._book.exports.get(key)
        if export is None or not export.prefilling:
            self.counters["late_progress"] += 1
            return [FreeBlocks(key, tuple(block_ids))] if block_ids else []
        first = len(export.blocks)
        export.blocks += block_ids
        if export.link is None or not block_ids:
            return []
        return [Send(export.link.number, Progress(export.lease_id, first, tuple(block_ids)))]

    def committed(
        self,
        key: Key,
        first_token: int,
        logprobs: TokenLogprobs | None,
        cached_tokens: int,
        now: float,
    ) -> list[ExportAction]:
        """The prompt is complete: every block was reported and its first token sampled."""
        export = self._book.exports.get(key)
        if export is None or not export.prefilling:
            self.counters["late_commit"] += 1
            return []
        expected = -(-export.num_tokens // self._own.layout.block_size)
        if len(export.blocks) != expected:
            message = (
                f"{key.request_id}: {len(export.blocks)} blocks were reported for a prompt of "
                f"{export.num_tokens} tokens, which has {expected}."
            )
            return self.failed(key, ErrorCode.INTERNAL, message, now)
        commit = Commit(
            lease_id=export.lease_id,
            num_tokens=export.num_tokens,
            model_digest=self._own.model_digest,
            epoch=self._own.epoch,
            first_token=first_token,
            logprobs=logprobs,
            cached_tokens=cached_tokens,
        )
        export.complete(commit, now)
        return [] if export.link is None else [Send(export.link.number, commit)]

    def failed(self, key: Key, code: ErrorCode, message: str, now: float) -> list[ExportAction]:
        """There will be no hand-over: it failed, or its router took it back.

        Also right for a key that was refused before `submitted`.
        """
        export = self._book.exports.get(key)
        if export is None:
            if key not in self._book.endings:
                self._book.remember(key, code, message)
            return self._book.revoke_early_claim(key)
        if export.state is ExportState.REVOKED:
            return []
        if export.link is None:
            return self._book.end(export, code, message)
        export.revoke(now)
        if export.link.closed:
            return []
        return [Send(export.link.number, Revoke(key, code, message))]

    def enough(self, key: Key, now: float) -> list[ExportAction]:
        """There will be no hand-over, since the first token ended the request.

        Decode is not told, whether it has claimed it or still will: the router, which hears the
        good end from prefill, takes decode's part back. Word of it from decode could overtake the
        good end, and would look like a failed hand-over.
        """
        export = self._book.exports.get(key)
        if export is None or export.state is ExportState.REVOKED:
            return []
        if export.link is None:
            message = "The first token ended the request."
            return self._book.end(export, ErrorCode.KV_TRANSFER, message, told=False)
        export.revoke(now)
        return []

    def withdrawn(self, key: Key, router: int) -> list[ExportAction]:
        """The router whose prompt this is has given up the part of decode.

        What decode has claimed is its own to release. What it has not, it never will; should a
        claim come after all, it gets a Revoke, and the router places the request again.
        """
        export = self._book.exports.get(key)
        if export is None or export.router != router or export.link is not None:
            return []
        if export.prefilling:
            return []  # its own failure is still to come
        message = f"The router gave {key.request_id} up before it was claimed."
        return self._book.end(export, ErrorCode.KV_TRANSFER, message)

    def router_left(self, router: int) -> list[ExportAction]:
        """The stream of a router ended, and with it the parts of decode that came over another."""
        keys = [export.key for export in self._book.exports.values() if export.router == router]
        return [action for key in keys for action in self.withdrawn(key, router)]

    # What links report.

    def link_opened(self, link: int) -> list[ExportAction]:
        """A decode worker opened a link; numbers are never used again."""
        self._book.links[link] = ClaimLink(link)
        return []

    def received(self, link: int, message: DecodeMessage, now: float) -> list[ExportAction]:
        """A message arrived on a link."""
        state = self._book.links.get(link)
        if state is None:
            self.counters["message_on_closed_link"] += 1
            return []
        if isinstance(message, Hello):
            return self._hello(state, message, now)
        if state.worker_id is None:
            return self._close(state, "the first message on a link must be a hello", now)
        match message:
            case Claim(key):
                return self._claimed(state, key, now)
            case Renew(seq):
                return self._renewed(state, seq, now)
            case Release(key):
                return self._released(state, key)
            case Probe(key, num_blocks):
                return self._probed(state, key, num_blocks, now)

    def link_closed(self, link: int, now: float) -> list[ExportAction]:
        """A link ended, for whatever reason. Its leases run out; nothing new is computed for it."""
        state = self._book.links.pop(link, None)
        if state is None:
            return []
        state.closed = True
        actions: list[ExportAction] = []
        message = f"The link to decode worker {state.worker_id} closed."
        for key in state.early_claims:
            self._book.remember(key, ErrorCode.WORKER_LOST, message)
        for export in self._book.exports.values():
            if export.link is state and export.prefilling:
                export.revoke(now)
                actions.append(CancelPrefill(export.key, ErrorCode.WORKER_LOST, message))
        return actions

    def expire(self, now: float) -> list[ExportAction]:
        """End what is over by time. Call it after the messages that have arrived were fed in.

        A lease past its time that was not ended yet may still be renewed: its blocks are here.
        """
        actions: list[ExportAction] = []
        for export in list(self._book.exports.values()):
            if export.expires_at(self._ttl_s) <= now:
                actions += self._expire(export)
        for link in list(self._book.links.values()):
            for key, claimed_at in list(link.early_claims.items()):
                if claimed_at + self._ttl_s <= now:
                    self.counters["expired_claim"] += 1
                    message = f"No router submitted {key.request_id} to {self._own.worker_id}."
                    self._book.remember(key, ErrorCode.KV_TRANSFER, message)
                    actions += self._book.revoke_early_claim(key)
        overdue = {
            export.link.number: export.link
            for export in self._book.exports.values()
            if export.link is not None and export.overdue_at(now, self._config.max_lease_s)
        }
        for link in overdue.values():
            self.counters["overdue_lease"] += 1
            actions += self._close(link, "a lease was neither used nor released", now)
        return actions

    # Rules.

    def _hello(self, link: ClaimLink, hello: Hello, now: float) -> list[ExportAction]:
        if link.worker_id is not None:
            return self._close(link, "a link takes one hello only", now)
        reason = hello_mismatch(self._own, hello)
        if reason:
            self.counters["refused_hello"] += 1
            return [Send(link.number, Refused(reason)), *self._close(link, reason, now)]
        link.worker_id = hello.worker_id
        return [Send(link.number, self._own)]

    def _claimed(self, link: ClaimLink, key: Key, now: float) -> list[ExportAction]:
        export = self._book.exports.get(key)
        if export is not None:
            if export.link is link:
                self.counters["duplicate_claim"] += 1
                return []
            return self._offer(export, link, now)
        ending = self._book.endings.get(key)
        if ending is not None:
            if not ending.told:
                return []
            return [Send(link.number, Revoke(key, ending.code, ending.message))]
        if key in link.early_claims:
            self.counters["duplicate_claim"] += 1
            return []
        if len(link.early_claims) >= self._config.max_early_claims:
            self.counters["refused_claim"] += 1
            return [Send(link.number, Revoke(key, ErrorCode.OVERLOADED, "Too many early claims."))]
        link.early_claims[key] = now
        return []

    def _probed(self, link: ClaimLink, key: Key, num_blocks: int, now: float) -> list[ExportAction]:
        most = self._own.num_blocks // self._config.probe_share
        known = key in self._book.exports or key in self._book.endings or key in link.early_claims
        if known or link.probe in self._book.exports or not 0 < num_blocks <= most:
            self.counters["refused_probe"] += 1
            message = f"{num_blocks} blocks can't be probed here and now, at most {most}."
            return [Send(link.number, Revoke(key, ErrorCode.OVERLOADED, message))]
        num_tokens = num_blocks * self._own.layout.block_size
        assert link.worker_id is not None
        export = self._book.exports[key] = Export(key, link.worker_id, num_tokens)
        link.probe = key
        return [*self._offer(export, link, now), ReserveScratch(key, num_blocks)]

    def _offer(self, export: Export, link: ClaimLink, now: float) -> list[ExportAction]:
        if export.link is not None or export.decode_worker_id != link.worker_id:
            self.counters["refused_claim"] += 1
            message = f"{export.key.request_id} is for another worker than {link.worker_id}."
            return [Send(link.number, Revoke(export.key, ErrorCode.KV_TRANSFER, message))]
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        return [Send(link.number, message) for message in export.offer(link, lease_id, now)]

    def _renewed(self, link: ClaimLink, seq: int, now: float) -> list[ExportAction]:
        if not link.renew(seq, now):
            self.counters["late_renew"] += 1
            return []
        return [Send(link.number, Renewed(seq))]

    def _released(self, link: ClaimLink, key: Key) -> list[ExportAction]:
        message = f"Decode worker {link.worker_id} gave up {key.request_id}."
        if link.early_claims.pop(key, None) is not None:
            self._book.remember(key, ErrorCode.KV_TRANSFER, message)
            return []
        export = self._book.exports.get(key)
        if export is None or export.link is not link:
            self.counters["late_release"] += 1
            return []
        return self._give_up(export, message)

    def _expire(self, export: Export) -> list[ExportAction]:
        self.counters["expired_lease"] += 1
        message = f"The lease of {export.key.request_id} expired after {self._ttl_s:g} s."
        actions = self._give_up(export, message)
        if export.link is not None and not export.link.closed:
            revoke = Revoke(export.key, ErrorCode.KV_TRANSFER, message)
            actions.append(Send(export.link.number, revoke))
        return actions

    def _give_up(self, export: Export, message: str) -> list[ExportAction]:
        """End an export that decode reads no more; if it is being computed, that is for nobody."""
        actions = self._book.end(export, ErrorCode.KV_TRANSFER, message)
        if export.prefilling:
            actions.append(CancelPrefill(export.key, ErrorCode.KV_TRANSFER, message))
        return actions

    def _close(self, link: ClaimLink, reason: str, now: float) -> list[ExportAction]:
        return [*self.link_closed(link.number, now), CloseLink(link.number, reason)]
