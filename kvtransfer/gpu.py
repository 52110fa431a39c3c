"""KV transfer between GPUs: peers of this host by the GPU's copies, others by NIXL.

Which way each peer is read is decided when its connection opens: a pool of this host that can't be
mapped, as where containers share no IPC namespace, is read by NIXL too, and the log says so.
"""

import logging
from collections.abc import Sequence

from core.errors import TransferError
from kvtransfer.channel import Channel, Copies
from kvtransfer.cuda_driver import CudaDriver
from kvtransfer.gpu_copies import GpuCopyChannel, GpuPool, this_host
from kvtransfer.nixl import MAX_BLOCKS_PER_READ, NixlTransport
from kvtransfer.peer_reads import PeerPool, Peers, QueuedRead
from kvtransfer.sealing import open_sealed, seal
from kvtransfer.transport import BlockPieces, BlockPool, Piece

log = logging.getLogger(__name__)


class GpuTransport:
    """`transport.Transport` for a pool in device memory."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        token: bytes,
        elsewhere: NixlTransport | None,
        driver: CudaDriver | None = None,
    ) -> None:
        """Make `pool` readable and ready to be filled.

        Args:
            pool: device memory; kept alive until the transport is gone.
            token: shared secret, equal on all workers; empty where there is none.
            elsewhere: serves the same pool to other hosts and reads theirs; closed with this.
            driver: copies; default: CUDA's.

        Raises:
            TransferError: the pool's memory can neither be mapped by others nor read by NIXL.
        """
        self._token = token
        self._elsewhere = elsewhere
        self._pool = pool
        self._driver = driver or CudaDriver()
        self._peers = Peers(pool)
        self._own: GpuPool | None = None
        try:
            self._own = GpuPool.of(pool, self._driver)
        except TransferError as error:
            if elsewhere is None:
                raise
            log.warning("other processes of this host can't map the KV pool: %s", error.message)
        own = b"" if self._own is None else self._own.pack()
        nixl = b"" if elsewhere is None else elsewhere.metadata()
        content = len(own).to_bytes(2, "little") + own + nixl
        self._metadata = seal(content, token)

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        return "gpu"

    def metadata(self) -> bytes:
        """How to map the pool, and NIXL's metadata, sealed."""
        return self._metadata

    def connect(self, peer_id: str, metadata: bytes, pieces: BlockPieces | None = None) -> None:
        """Start connecting. If the peer can't be reached, its READs fail."""
        content = open_sealed(metadata, self._token, library="a GPU's", peer_id=peer_id)
        size = 2 + int.from_bytes(content[:2], "little")
        mapped = GpuPool.unpack(content[2:size])[0] if size > 2 else None
        nixl = content[size:]
        here = mapped is not None and self._own is not None and mapped.host == this_host()
        if not here and not (nixl and self._elsewhere):
            raise TransferError(
                f"Peer {peer_id} is on another host, or its memory can't be mapped, and not both "
                "workers have NIXL: install the extra diptych[nixl-cu13] on both."
            )
        reader = None
        if nixl and self._elsewhere is not None:
            reader = self._elsewhere.reader_of(peer_id, nixl)
        if mapped is not None:
            pool = PeerPool(mapped.num_blocks, mapped.block_bytes)
        else:
            assert reader is not None
            pool = reader.pool

        def open_channel(checked: Sequence[Piece]) -> Channel:
            ways: list[Channel] = []
            if here:
                assert mapped is not None and self._own is not None
                ways.append(
                    GpuCopyChannel(
                        self._driver,
                        own_address=self._pool.base_address,
                        own=self._own,
                        peer=mapped,
                        pieces=checked,
                    )
                )
            if reader is not None:
                ways.append(reader.channel(checked))
            return _FirstWay(peer_id, ways)

        self._peers.add(peer_id, pool, pieces, open_channel)

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> QueuedRead:
        """Queue a READ behind the peer's earlier ones."""
        return self._peers.read(peer_id, pairs, MAX_BLOCKS_PER_READ)

    def disconnect(self, peer_id: str) -> None:
        """Wait for the peer's copies under way and unmap it, or destroy the agent that reads it."""
        self._peers.remove(peer_id)

    def close(self) -> None:
        """Disconnect all peers, stop serving. Idempotent."""
        self._peers.close()
        if self._elsewhere is not None:
            self._elsewhere.close()


class _FirstWay:
    """The first of several channels to one peer that opens."""

    def __init__(self, peer_id: str, ways: Sequence[Channel]) -> None:
        self._peer_id = peer_id
        self._ways = ways
        self._open = ways[0]

    def open(self) -> bool:
        for way in self._ways:
            self._open = way
            try:
                at_once = way.open()
            except TransferError as error:
                if way is self._ways[-1]:
                    raise
                way.close()
                log.warning(
                    "KV of peer %s can't be copied by the GPU (%s); NIXL reads it",
                    self._peer_id,
                    error.message,
                )
            else:
                log.info("KV of peer %s is read by %s", self._peer_id, type(way).__name__)
                return at_once
        raise AssertionError("the last way opens or raises")

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> Copies | None:
        return self._open.read(remote_ids, own_ids)

    def interrupt(self) -> None:
        for way in self._ways:
            way.interrupt()

    def close(self) -> None:
        self._open.close()
