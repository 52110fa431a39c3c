"""The seam between the lease protocol and whatever moves bytes: what every transport does.

A transport lives in the engine process, next to the memory that it serves and fills. All its
methods are called by the engine loop's thread, return at once and never wait for a peer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from core.kv_layout import KvLayout


class BlockPool(Protocol):
    """Contiguous memory cut into equal blocks; block i starts at base_address + i * block_bytes."""

    @property
    def layout(self) -> KvLayout:
        """How one block lies in memory."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool; ids are [0, num_blocks)."""
        ...

    @property
    def base_address(self) -> int:
        """Virtual address of block 0; valid until the transport is closed."""
        ...

    @property
    def device_id(self) -> int | None:
        """CUDA device index, or None for host memory."""
        ...


class Piece(NamedTuple):
    """A run of bytes that a READ copies from each block of a peer into an own block."""

    remote_offset: int
    """From the start of the peer's block."""
    own_offset: int
    num_bytes: int

    def joins(self, following: "Piece") -> bool:
        """True if the two are one run on both sides."""
        return (
            self.remote_offset + self.num_bytes == following.remote_offset
            and self.own_offset + self.num_bytes == following.own_offset
        )


@dataclass(frozen=True, slots=True)
class BlockPieces:
    """What of every block is read from a peer whose blocks hold other bytes than the own ones."""

    remote_block_bytes: int
    pieces: tuple[Piece, ...]
    """In the order of the own block, without overlap there."""


class ReadState(StrEnum):
    """Where one READ is. DONE and FAILED are final: no byte is written after either was seen."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Read(Protocol):
    """One batch of blocks on its way from a peer into the local pool."""

    def poll(self) -> ReadState:
        """Look, don't wait."""
        ...

    @property
    def error(self) -> str:
        """Why it FAILED; empty otherwise."""
        ...

    @property
    def duration_s(self) -> float:
        """Seconds that the copy took once it was this READ's turn; 0 until it is DONE."""
        ...


class Transport(Protocol):
    """Moves blocks by one-sided READ. Raises core.errors.TransferError where it can't go on."""

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        ...

    def metadata(self) -> bytes:
        """What a peer needs in order to connect to this pool."""
        ...

    def connect(self, peer_id: str, metadata: bytes, pieces: BlockPieces | None = None) -> None:
        """Make a peer's pool readable. A peer id names one connection; it is never used again.

        Every READ from it copies the pieces of each block; None: whole blocks of equal size.
        """
        ...

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> Read:
        """Start copying blocks: (peer's block id, own block id) each."""
        ...

    def disconnect(self, peer_id: str) -> None:
        """Drop a peer. On return its pending reads are FAILED and write nothing any more.

        Nothing to do for a peer that is not connected.
        """
        ...

    def close(self) -> None:
        """Drop all peers and free everything. Idempotent."""
        ...
