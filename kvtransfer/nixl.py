"""KV transfer over NIXL (UCX): one-sided READs over shared memory, RDMA, NVLink or TCP.

One agent serves the pool; each peer is read by an agent of its own, in a thread of its own, because
only the end of an agent ends its READs: over UCX's TCP emulation the bytes of a frozen peer still
landed in the local block after the transfer and the descriptor lists had been released, the remote
agent removed and the memory deregistered (nixl-cu12 1.5.1; docs/adr/0003-leases.md). Invariant: a
READ is seen FAILED only after the agent that did it is gone.

Access: whoever was given the metadata over the authenticated link can read the pool. The token
seals the metadata, so that nothing else reaches NIXL's parser; keep strangers off the network.
"""

import contextlib
import gc
import importlib
import logging
import os
import secrets
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import TransferError
from kvtransfer.cuda_driver import use_gpu
from kvtransfer.peer_reads import PeerPool, Peers, QueuedRead
from kvtransfer.sealing import open_sealed, seal
from kvtransfer.transport import BlockPieces, BlockPool, Piece

log = logging.getLogger(__name__)

_MODULES = ("nixl_cu13._api", "nixl_cu12._api", "nixl._api")
_METADATA = struct.Struct("<8sQIQI")
_MAGIC = b"DIPTYCHN"
_HOST = 0xFFFFFFFF
_LOCAL = "NIXL_INIT_AGENT"
MAX_DESCRIPTORS = (1 << 31) - 1
"""NIXL's indices are signed 32-bit numbers."""
MAX_BLOCKS_PER_READ = 1 << 20
_PROGRESS_TIMEOUT_US = 5000
"""How long the serving agent's thread waits for events. NIXL's default, 0, spins: it took a whole
core, while 5 ms took nothing and served READs as fast."""
_SOLE_OWNER = 2
"""sys.getrefcount of an object that only the asking function holds."""
_SPINS = 50
_POLL_S = 0.0003
"""Between two looks at a READ, after the first few."""


def ucx_environment(environ: Mapping[str, str], *, loopback: bool) -> dict[str, str]:
    """Variables to start an engine process with, so that UCX and NIXL behave; set ones stay.

    Args:
        environ: the variables as they are.
        loopback: every peer is on this machine: listen on no other interface.
    """
    wanted = {"NIXL_LOG_LEVEL": "WARN", "UCX_LOG_LEVEL": "error"}
    if loopback:
        wanted["UCX_NET_DEVICES"] = "lo"
    return {name: value for name, value in wanted.items() if name not in environ}


def load_nixl() -> ModuleType:
    """NIXL's Python API from whichever wheel is installed.

    Raises:
        TransferError: none is.
    """
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
    raise TransferError(
        "NIXL can't be imported; install the extra diptych[nixl] or set kv_transport to tcp "
        f"({'; '.join(reasons)})."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlPool:
    """Where a pool lies, in the words of NIXL."""

    base_address: int
    num_blocks: int
    block_bytes: int
    device_id: int | None

    @property
    def mem_type(self) -> str:
        """NIXL's name of the kind of memory."""
        return "DRAM" if self.device_id is None else "VRAM"

    @property
    def region(self) -> tuple[int, int, int, str]:
        """(address, bytes, device, tag) of the whole pool."""
        return (self.base_address, self.num_blocks * self.block_bytes, self.device_id or 0, "")

    def descriptors(self, runs: Sequence[tuple[int, int]]) -> NDArray[np.uint64]:
        """One row for each (offset, bytes) of a block, standing for that run of every block.

        Returns:
            (address, bytes, device, stride, count) of NIXL's strided lists, [num_runs, 5]. The run
            r of block b has the index r * num_blocks + b.
        """
        table = np.empty((len(runs), 5), dtype=np.uint64)
        table[:, 0] = [self.base_address + offset for offset, _ in runs]
        table[:, 1] = [num_bytes for _, num_bytes in runs]
        table[:, 2:] = (self.device_id or 0, self.block_bytes, self.num_blocks)
        return table

    def pack(self) -> bytes:
        """For the metadata."""
        device = _HOST if self.device_id is None else self.device_id
        return _METADATA.pack(_MAGIC, self.base_address, self.num_blocks, self.block_bytes, device)

    @classmethod
    def unpack(cls, data: bytes) -> "NixlPool":
        """What `pack` made; raises TransferError for anything else."""
        try:
            magic, base_address, num_blocks, block_bytes, device = _METADATA.unpack_from(data)
        except struct.error as error:
            raise TransferError(f"Not the metadata of a NIXL transport: {error}.") from error
        if magic != _MAGIC or not (base_address and num_blocks and block_bytes):
            raise TransferError("Not the metadata of a NIXL transport that this version knows.")
        return cls(
            base_address=base_address,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            device_id=None if device == _HOST else device,
        )


def new_agent(api: ModuleType, pool: NixlPool, *, serves: bool) -> Any:
    """A NIXL agent that has registered the pool.

    Args:
        api: NIXL's Python API.
        pool: own memory.
        serves: others read from it, so UCX must make progress on its own.

    Raises:
        TransferError: NIXL can't start or use the memory.
    """
    name = f"diptych-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        agent = api.nixl_agent(name, api.nixl_agent_config(backends=[], enable_prog_thread=False))
        # The Python class can't pass on a progress timeout, so its native agent is replaced.
        config = api.nixlBind.nixlAgentConfig()
        config.useProgThread = serves
        config.pthrDelay = _PROGRESS_TIMEOUT_US
        config.useListenThread = False
        config.syncMode = api.nixlBind.NIXL_THREAD_SYNC_NONE
        agent.agent = api.nixlBind.nixlAgent(name, config)
        agent.create_backend("UCX")
        agent.register_memory([pool.region], mem_type=pool.mem_type)
    except Exception as error:
        raise TransferError(f"NIXL does not start: {error!r}") from error
    return agent


class NixlChannel:
    """An agent that reads one peer's pool; see `peer_reads.Channel`."""

    def __init__(
        self,
        api: ModuleType,
        *,
        own: NixlPool,
        peer: NixlPool,
        peer_metadata: bytes,
        pieces: Sequence[Piece],
    ) -> None:
        """Not connected yet. `pieces` of every block are moved, with a descriptor each."""
        self._api = api
        self._own = own
        self._peer = peer
        self._peer_metadata = peer_metadata
        self._pieces = pieces
        self._interrupted = threading.Event()
        self._agent: Any = None
        self._own_side: Any = None
        self._peer_side: Any = None

    def open(self) -> None:
        """Make the agent and prepare the descriptors of both pools, once for all READs."""
        if self._own.device_id is not None:
            use_gpu(self._own.device_id)
        self._agent = new_agent(self._api, self._own, serves=False)
        try:
            name = self._agent.add_remote_agent(self._peer_metadata)
            self._own_side = self._agent.prep_xfer_dlist(
                _LOCAL,
                self._own.descriptors([(each.own_offset, each.num_bytes) for each in self._pieces]),
                mem_type=self._own.mem_type,
            )
            self._peer_side = self._agent.prep_xfer_dlist(
                name.decode() if isinstance(name, bytes) else name,
                self._peer.descriptors(
                    [(each.remote_offset, each.num_bytes) for each in self._pieces]
                ),
                mem_type=self._peer.mem_type,
            )
        except Exception as error:
            raise TransferError(f"NIXL can't connect: {error!r}") from error

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> None:
        """Post a READ and look at it until it is done."""
        transfer: Any = None
        try:
            transfer = self._agent.make_prepped_xfer(
                "READ",
                self._own_side,
                self._indices(own_ids, self._own.num_blocks),
                self._peer_side,
                self._indices(remote_ids, self._peer.num_blocks),
            )
            state = self._agent.transfer(transfer)
            looks = 0
            while state == "PROC" and not self._interrupted.is_set():
                looks += 1
                time.sleep(0 if looks < _SPINS else _POLL_S)
                state = self._agent.check_xfer_state(transfer)
        except Exception as error:
            raise TransferError(f"NIXL: {error!r}") from error
        finally:
            _release(transfer)
        if state != "DONE":
            raise TransferError(f"NIXL left a READ in state {state}")

    def interrupt(self) -> None:
        """Let `read` return; NIXL's own calls do not wait for the peer."""
        self._interrupted.set()

    def close(self) -> None:
        """Destroy the agent: the UCX worker's end is what stops a READ."""
        _release(self._own_side)
        _release(self._peer_side)
        self._own_side = self._peer_side = None
        if self._agent is None:
            return
        native = self._agent.agent
        self._agent = None
        if sys.getrefcount(native) > _SOLE_OWNER:
            gc.collect()
        assert sys.getrefcount(native) <= _SOLE_OWNER, "held elsewhere, its READs would go on"

    def _indices(self, ids: Sequence[int], num_blocks: int) -> NDArray[np.int32]:
        """Descriptors of whole blocks, [num_pieces * num_ids]: the first piece of each, and so on.

        Not block by block: NIXL joins descriptors in a row whose bytes are neighbours, and blocks
        that were to be cut would be whole again.
        """
        pieces = np.arange(len(self._pieces), dtype=np.int32) * np.int32(num_blocks)
        return (pieces[:, None] + np.asarray(ids, dtype=np.int32)[None, :]).reshape(-1)


def cut_pieces(pieces: Sequence[Piece], most: int) -> tuple[Piece, ...]:
    """The same bytes in pieces of at most `most`."""
    return tuple(
        Piece(remote + start, own + start, min(most, num_bytes - start))
        for remote, own, num_bytes in pieces
        for start in range(0, num_bytes, most)
    )


def _release(handle: Any) -> None:
    if handle is not None:
        with contextlib.suppress(Exception):
            handle.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlReader:
    """What it takes to read one peer by NIXL."""

    api: ModuleType
    own: NixlPool
    peer_id: str
    peer: NixlPool
    peer_metadata: bytes
    descriptor_bytes: int

    @property
    def pool(self) -> PeerPool:
        """Size of the peer's pool."""
        return PeerPool(self.peer.num_blocks, self.peer.block_bytes)

    def channel(self, pieces: Sequence[Piece]) -> NixlChannel:
        """A channel that reads these pieces of every block.

        Raises:
            TransferError: they are more than NIXL can number.
        """
        cut = cut_pieces(pieces, self.descriptor_bytes)
        if len(cut) * max(self.own.num_blocks, self.peer.num_blocks) > MAX_DESCRIPTORS:
            raise TransferError(
                f"Blocks of peer {self.peer_id} take {len(cut)} descriptors each, more than NIXL "
                "can number; use a larger descriptor_bytes."
            )
        return NixlChannel(
            self.api,
            own=self.own,
            peer=self.peer,
            peer_metadata=self.peer_metadata,
            pieces=cut,
        )


class NixlTransport:
    """`transport.Transport` over NIXL's UCX backend."""

    def __init__(
        self, pool: BlockPool, *, token: bytes, descriptor_bytes: int | None = None
    ) -> None:
        """Make `pool` readable and ready to be filled.

        Args:
            pool: host or device memory; kept alive until the transport is gone.
            token: shared secret, equal on all workers; empty where there is none.
            descriptor_bytes: most bytes of one descriptor, of which a READ may have many per block;
                None: no limit.

        Raises:
            TransferError: NIXL is not installed or can't use the memory, or no byte is allowed.
        """
        if descriptor_bytes is not None and descriptor_bytes < 1:
            raise TransferError(f"descriptor_bytes must be at least 1, got {descriptor_bytes}.")
        self._descriptor_bytes = descriptor_bytes or pool.layout.block_bytes
        self._api = load_nixl()
        self._token = token
        self._own = NixlPool(
            base_address=pool.base_address,
            num_blocks=pool.num_blocks,
            block_bytes=pool.layout.block_bytes,
            device_id=pool.device_id,
        )
        self._pool = pool
        self._peers = Peers(pool)
        self._served: Any = new_agent(self._api, self._own, serves=True)
        content = self._own.pack() + bytes(self._served.get_agent_metadata())
        self._metadata = seal(content, token)

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        return "nixl"

    def metadata(self) -> bytes:
        """Where the pool lies and the serving agent's own metadata, sealed."""
        return self._metadata

    def connect(self, peer_id: str, metadata: bytes, pieces: BlockPieces | None = None) -> None:
        """Start connecting. If the peer can't be reached, its READs fail."""
        reader = self.reader_of(peer_id, metadata)
        self._peers.add(peer_id, reader.pool, pieces, reader.channel)

    def reader_of(self, peer_id: str, metadata: bytes) -> "NixlReader":
        """A way to read one peer, not connected yet.

        Raises:
            TransferError: the metadata are not NIXL's, or not of a holder of the token.
        """
        content = open_sealed(metadata, self._token, library="NIXL", peer_id=peer_id)
        return NixlReader(
            api=self._api,
            own=self._own,
            peer_id=peer_id,
            peer=NixlPool.unpack(content),
            peer_metadata=content[_METADATA.size :],
            descriptor_bytes=self._descriptor_bytes,
        )

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> QueuedRead:
        """Queue a READ behind the peer's earlier ones."""
        return self._peers.read(peer_id, pairs, MAX_BLOCKS_PER_READ)

    def disconnect(self, peer_id: str) -> None:
        """Destroy the agent that reads this peer."""
        self._peers.remove(peer_id)

    def close(self) -> None:
        """Disconnect all peers, stop serving. Idempotent."""
        self._peers.close()
        self._served = None
