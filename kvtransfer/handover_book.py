"""Which hand-overs and links decode has, and what ends with each of them.

Used by `handover.py` alone, which decides when. Invariants: a record is on one link, from `add` to
its end; it ends once, and goes when no READ is pending, with its blocks dropped and its claim
released; a link takes all of its records along, and after DisconnectPeer none has a READ pending.
"""

from core.errors import ErrorCode
from kvtransfer.actions import (
    CloseLink,
    DisconnectPeer,
    DropBlocks,
    Fail,
    HandoverAction,
    OpenLink,
    Send,
)
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.handover_record import Handover
from kvtransfer.messages import Hello, Key, Release
from kvtransfer.peer_link import PeerLink
from kvtransfer.probing import ProbeSchedule, probe_ended


class HandoverBook:
    """Records by key and links by number; numbers are never used again."""

    def __init__(self, own: Hello, config: HandoverConfig, probes: ProbeSchedule) -> None:
        """`own` is said on every link that is opened; `probes` hears how links end."""
        self._own = own
        self._config = config
        self._probes = probes
        self._next_link = 1
        self.links: dict[int, PeerLink] = {}
        self.handovers: dict[Key, Handover] = {}

    def link_to(
        self, worker_id: str, epoch: int, address: str, now: float
    ) -> tuple[PeerLink, list[HandoverAction]]:
        """The link to a lifetime of a worker, opened if there is none."""
        for link in self.links.values():
            if (link.worker_id, link.epoch, link.address) == (worker_id, epoch, address):
                return link, []
        config = self._config
        link = PeerLink(self._next_link, worker_id, epoch, address, now, config.drift_ratio)
        link.proven = not config.test_links
        self._next_link += 1
        self.links[link.number] = link
        return link, [OpenLink(link.number, address), Send(link.number, self._own)]

    def add(self, handover: Handover) -> None:
        """A new record, last in turn on its link."""
        self.handovers[handover.key] = handover
        handover.link.keys[handover.key] = None
        if handover.probe:
            handover.link.probe = handover.key

    def on(self, link: PeerLink) -> list[Handover]:
        """The records of a link, next to be served first."""
        return [self.handovers[key] for key in link.keys]

    def find(self, link: PeerLink, key: Key) -> Handover | None:
        """The record of a key, if it is on this link."""
        handover = self.handovers.get(key)
        return handover if handover is not None and handover.link is link else None

    def end(self, key: Key, fail: Fail | None, now: float) -> list[HandoverAction]:
        """End a record, with a Fail or without a word. It stays while a READ is pending.

        The test of a link that fails ends the link as well.
        """
        handover = self.handovers.get(key)
        if handover is None or handover.ended:
            return []
        if handover.probe and (doubt := self._probes.doubt(handover, fail)):
            return self.drop_link(handover.link, ErrorCode.KV_TRANSFER, doubt, now)
        handover.ended = True
        actions: list[HandoverAction] = [] if fail is None else [fail]
        if handover.probe:
            actions = [probe_ended(key, fail)]
        return actions if handover.read is not None else actions + self.finish(handover, now)

    def finish(self, handover: Handover, now: float, *, dead: bool = False) -> list[HandoverAction]:
        """Give back everything of an ended record, now that no READ is pending.

        Args:
            handover: ended.
            now: in seconds.
            dead: its link is gone, and with it the claim.
        """
        assert handover.ended and handover.read is None
        self.forget(handover, now)
        actions: list[HandoverAction] = []
        if handover.reserve_asked:
            actions.append(DropBlocks(handover.key))
        if handover.claimed and not dead:
            actions.append(Send(handover.link.number, Release(handover.key)))
        return actions

    def forget(self, handover: Handover, now: float) -> None:
        """Take a record out; whoever was given its blocks has them."""
        link = handover.link
        del self.handovers[handover.key]
        del link.keys[handover.key]
        if handover.lease_id is not None:
            del link.leases[handover.lease_id]
        if handover.probe:
            link.probe = None
        else:
            link.idle_since = now

    def drop_link(
        self, link: PeerLink, code: ErrorCode, message: str, now: float, *, dead: bool = False
    ) -> list[HandoverAction]:
        """End a link and all on it at once.

        Args:
            link: open or opening.
            code: of the Fail of each prompt on it.
            message: likewise.
            now: in seconds.
            dead: it is closed already.
        """
        del self.links[link.number]
        actions = self._probes.dropped(link, code, message, now)
        if link.hello is not None:
            actions.append(DisconnectPeer(link.peer_id))
        for handover in self.on(link):
            handover.read = None
            if not handover.ended:
                handover.ended = True
                fail = Fail(handover.key, code, message)
                actions.append(probe_ended(handover.key, fail) if handover.probe else fail)
            actions += self.finish(handover, now, dead=dead)
        if not dead:
            actions.append(CloseLink(link.number, message))
        return actions
