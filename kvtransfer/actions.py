"""What the state machines ask of their caller: to be carried out in order, before the next event.

Whatever an action gives rise to (a READ that can't start, say) is fed in after the last action of
the list; a machine counts an action as done when it has returned it. `ExportAction` comes from the
prefill side (`export.py`), `HandoverAction` from the decode side (`handover.py`).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from core.errors import ErrorCode
from core.tokens import TokenLogprobs
from kvtransfer.messages import DecodeMessage, Hello, Key, PrefillMessage

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Send(Generic[M]):
    """Queue a message on a link; dropping it silently is right only if the link is closed."""

    link: int
    message: M


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Close a link. The machine forgot it already and ignores what still arrives on it."""

    link: int
    reason: str


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Give up one hold on each of these blocks of prefill's pool."""

    key: Key
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelPrefill:
    """Nobody will take this prompt: stop computing it and tell its router why.

    Nothing to do if the engine and the router are done with it already.
    """

    key: Key
    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class ReserveScratch:
    """Find this many blocks for a probe now, or not at all.

    Prefill stamps the first, takes one hold on each and reports `progressed` and `committed`,
    decode reports `reserved` as for a prompt; either reports `failed` if they are not to be had.
    """

    key: Key
    num_blocks: int


ExportAction = Send[PrefillMessage] | CloseLink | FreeBlocks | CancelPrefill | ReserveScratch


@dataclass(frozen=True, slots=True)
class OpenLink:
    """Open a link to a prefill worker under this number, which is never used again.

    Messages sent before it is up wait in it. A link that can't be opened is reported as closed.
    """

    link: int
    address: str


@dataclass(frozen=True, slots=True)
class ConnectPeer:
    """Call `transport.connect`; if that raises, report `peer_failed`."""

    link: int
    peer_id: str
    hello: Hello
    """The peer's."""


@dataclass(frozen=True, slots=True)
class DisconnectPeer:
    """Call `transport.disconnect`; forget the peer's READs, of which no byte may land after it."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Reserve:
    """Find blocks for the prompt, now or as soon as there is room; then report `reserved`."""

    key: Key


@dataclass(frozen=True, slots=True)
class DropBlocks:
    """No READ into this key's blocks is pending: cancel its reservation, granted or waiting."""

    key: Key


@dataclass(frozen=True, slots=True)
class StartRead:
    """Call `transport.read`; report its end (or that it raised) as `read_done` or `read_failed`."""

    key: Key
    read_no: int
    peer_id: str
    pairs: tuple[tuple[int, int], ...]
    """(prefill's block id, own block id) each."""
    stamped: bool = False
    """Its one block holds the stamp of the key; if that is not what came, report `read_failed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """The whole prompt is in the reserved blocks: adopt them and generate after `first_token`."""

    key: Key
    first_token: int
    logprobs: TokenLogprobs | None
    prefill_cached_tokens: int
    """Prompt tokens that prefill had cached."""
    num_read_blocks: int
    """Blocks that were moved; the rest was cached here."""
    transfer_s: float
    """Seconds from the Commit's arrival to the last block's."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The hand-over is lost. Its reservation stays until DropBlocks."""

    key: Key
    code: ErrorCode
    message: str


class ProbeOutcome(StrEnum):
    """How the measurement of a link ended."""

    MEASURED = "measured"
    PREEMPTED = "preempted"
    """A hand-over needed the link."""
    REFUSED = "refused"
    """One side had no blocks to spare."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ProbeEnded:
    """A probe is over. Its blocks stay reserved until DropBlocks."""

    key: Key
    outcome: ProbeOutcome
    message: str


@dataclass(frozen=True, slots=True)
class LinkTested:
    """What is known of the way on which KV comes from one lifetime of a prefill worker."""

    worker_id: str
    epoch: int
    failure: str | None
    """Why a test block did not come as it was sent; empty: it did; None: nothing is known now."""


HandoverAction = (
    Send[DecodeMessage]
    | OpenLink
    | CloseLink
    | ConnectPeer
    | DisconnectPeer
    | Reserve
    | DropBlocks
    | StartRead
    | Deliver
    | Fail
    | ReserveScratch
    | ProbeEnded
    | LinkTested
)
