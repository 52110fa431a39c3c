"""KV transfer over NIXL (UCX): one-sided READs over shared memory, RDMA, NVLink or TCP.

Two agents per worker: one is read by peers and lives as long as the transport, one reads and may be
replaced. Invariant: a READ that is seen FAILED writes nothing any more. NIXL alone can't promise
that for a READ in flight: over UCX's TCP emulation the bytes of a frozen peer still landed in the
local block after the handle and the descriptor lists had been released, the remote agent removed
and the memory deregistered (nixl-cu12 1.5.1; docs/adr/0003-leases.md). Only the end of the UCX
worker ends them. So an unfinished READ is cancelled by replacing the reading agent, which takes
some 20 ms on a CPU, and by starting the READs from all other peers again.

Access: whoever was given the metadata over the authenticated link can read the pool. The token
seals the metadata, so that nothing else reaches NIXL's parser; keep strangers off the network.
"""

import contextlib
import gc
import hashlib
import hmac
import importlib
import logging
import os
import secrets
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import TransferError
from kvtransfer.pool_memory import check_distinct, check_ids
from kvtransfer.transport import BlockPool, ReadState

log = logging.getLogger(__name__)

_MODULES = ("nixl_cu13._api", "nixl_cu12._api", "nixl._api")
_METADATA = struct.Struct("<8sQIQI")
_MAGIC = b"DIPTYCHN"
_HOST = 0xFFFFFFFF
_LOCAL = "NIXL_INIT_AGENT"
_SEAL_BYTES = hashlib.sha256().digest_size
MAX_DESCRIPTORS = 1 << 22

Indices = NDArray[np.int32]


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


class _Side:
    """Where a pool lies and how its blocks are cut into descriptors."""

    def __init__(
        self, *, base_address: int, num_blocks: int, block_bytes: int, device_id: int | None
    ) -> None:
        self.base_address = base_address
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.device_id = device_id

    @property
    def mem_type(self) -> str:
        return "DRAM" if self.device_id is None else "VRAM"

    def region(self) -> tuple[int, int, int, str]:
        return (self.base_address, self.num_blocks * self.block_bytes, self.device_id or 0, "")

    def descriptors(self, descriptor_bytes: int) -> NDArray[np.uint64]:
        """(address, bytes, device) of every descriptor of the pool, in order of address."""
        num_bytes = self.num_blocks * self.block_bytes
        table = np.empty((num_bytes // descriptor_bytes, 3), dtype=np.uint64)
        starts = np.arange(0, num_bytes, descriptor_bytes, dtype=np.uint64)
        table[:, 0] = np.uint64(self.base_address) + starts
        table[:, 1] = descriptor_bytes
        table[:, 2] = self.device_id or 0
        return table

    def pack(self) -> bytes:
        device = _HOST if self.device_id is None else self.device_id
        fields = (_MAGIC, self.base_address, self.num_blocks, self.block_bytes, device)
        return _METADATA.pack(*fields)

    @classmethod
    def unpack(cls, data: bytes) -> "_Side":
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


class NixlRead:
    """One READ over NIXL. UCX's progress thread moves it forward; polling sees its end."""

    def __init__(
        self, owner: "NixlTransport", peer: "_Peer", own: Indices, remote: Indices
    ) -> None:
        """Made by NixlTransport.read only; `own` and `remote` index descriptors, [num_pieces]."""
        self._owner = owner
        self.peer = peer
        self.own = own
        self.remote = remote
        self.handle: Any = None
        self.state = ReadState.PENDING
        self.error = ""

    def poll(self) -> ReadState:
        """Look, don't wait."""
        if self.state is ReadState.PENDING:
            self._owner.progress(self)
        return self.state

    def finish(self, error: str) -> None:
        """End it, once; `error` empty means that all bytes are here."""
        if self.state is ReadState.PENDING:
            self.error = error
            self.state = ReadState.FAILED if error else ReadState.DONE

    def drop_handle(self) -> None:
        """Let NIXL forget the transfer. That alone does not stop it."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with contextlib.suppress(Exception):
                handle.release()


class _Peer:
    """A peer's pool as the reading agent knows it."""

    def __init__(self, peer_id: str, side: _Side, metadata: bytes) -> None:
        self.peer_id = peer_id
        self.side = side
        self.metadata = metadata
        self.agent_name = ""
        self.descriptors: Any = None
        self.reads: set[NixlRead] = set()
        self.lost = ""
        """Why nothing can be read from it any more; empty while it can."""

    def lose(self, error: str) -> None:
        """Fail its READs, once nothing can land from them."""
        self.lost = self.lost or error
        for read in self.reads:
            read.finish(self.lost)
        self.reads.clear()

    def drop_descriptors(self) -> None:
        descriptors, self.descriptors = self.descriptors, None
        if descriptors is not None:
            with contextlib.suppress(Exception):
                descriptors.release()


class NixlTransport:
    """`transport.Transport` over NIXL's UCX backend."""

    def __init__(
        self, pool: BlockPool, *, token: bytes, descriptor_bytes: int | None = None
    ) -> None:
        """Make `pool` readable and ready to be filled.

        Args:
            pool: host or device memory; it outlives the transport.
            token: shared secret, equal on all workers; empty where there is none.
            descriptor_bytes: size of one piece that NIXL moves, a divisor of the block's size;
                None: whole blocks. Smaller pieces were faster between two GPUs over NVLink.

        Raises:
            TransferError: NIXL is not installed or can't use the memory.
        """
        self._api = load_nixl()
        self._token = token
        self._side = _Side(
            base_address=pool.base_address,
            num_blocks=pool.num_blocks,
            block_bytes=pool.layout.block_bytes,
            device_id=pool.device_id,
        )
        self._descriptor_bytes = descriptor_bytes or pool.layout.block_bytes
        if pool.layout.block_bytes % self._descriptor_bytes:
            raise TransferError(
                f"descriptor_bytes must divide the block's {pool.layout.block_bytes} bytes, "
                f"got {descriptor_bytes}."
            )
        self._per_block = pool.layout.block_bytes // self._descriptor_bytes
        self._peers: dict[str, _Peer] = {}
        self._served: Any = self._new_agent("serve")
        self._reader: Any = None
        self._own_descriptors: Any = None
        self._open_reader()
        content = self._side.pack() + bytes(self._served.get_agent_metadata())
        self._metadata: bytes = self._seal(content) + content

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        return "nixl"

    def metadata(self) -> bytes:
        """Where the pool lies and the serving agent's own metadata, sealed."""
        return self._metadata

    def connect(self, peer_id: str, metadata: bytes) -> None:
        """Load a peer's metadata; UCX connects in the background or with the first READ."""
        if peer_id in self._peers:
            raise TransferError(f"Peer {peer_id} is connected already.")
        seal, content = metadata[:_SEAL_BYTES], metadata[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(content)):
            raise TransferError(
                f"The transport metadata of peer {peer_id} are not NIXL's, or were sealed with "
                "another token; give both workers the same."
            )
        side = _Side.unpack(content)
        if side.block_bytes != self._side.block_bytes:
            raise TransferError(
                f"Blocks of peer {peer_id} hold {side.block_bytes} bytes, ours "
                f"{self._side.block_bytes}."
            )
        if side.num_blocks * self._per_block > MAX_DESCRIPTORS:
            raise TransferError(f"Peer {peer_id} has too many blocks: {side.num_blocks}.")
        if self._reader is None:
            self._open_reader()
        peer = _Peer(peer_id, side, content[_METADATA.size :])
        error = self._add(peer)
        if error:
            raise TransferError(f"Can't reach peer {peer_id}: {error}")
        self._peers[peer_id] = peer

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> NixlRead:
        """Post a READ of these blocks."""
        peer = self._peers.get(peer_id)
        if peer is None:
            raise TransferError(f"Peer {peer_id} is not connected.")
        if not pairs:
            raise TransferError("A READ moves at least one block.")
        remote_ids = [remote for remote, _ in pairs]
        own_ids = [own for _, own in pairs]
        check_ids(remote_ids, peer.side.num_blocks, "the peer's")
        check_ids(own_ids, self._side.num_blocks, "our")
        check_distinct(own_ids)
        if peer.lost:
            raise TransferError(f"Peer {peer_id} is lost: {peer.lost}")
        read = NixlRead(self, peer, self._indices(own_ids), self._indices(remote_ids))
        peer.reads.add(read)
        self._post(read)
        return read

    def progress(self, read: NixlRead) -> None:
        """Look whether a READ has ended. Called by NixlRead only."""
        state, error = self._try(lambda: self._reader.check_xfer_state(read.handle))
        self._take(read, state, error)

    def disconnect(self, peer_id: str) -> None:
        """Drop a peer; a READ in flight costs a new reading agent (see the module)."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        self._lose(peer, "the peer was disconnected")
        del self._peers[peer_id]
        if peer.descriptors is not None:
            peer.drop_descriptors()
            self._try(lambda: self._reader.remove_remote_agent(peer.agent_name))

    def close(self) -> None:
        """Destroy both agents: nothing is read or served any more. Idempotent."""
        self._close_reader()
        for peer in self._peers.values():
            peer.lose("the transport was closed")
        self._peers.clear()
        self._served = None

    # Agents.

    def _seal(self, content: bytes) -> bytes:
        return hmac.digest(self._token, content, "sha256")

    def _try(self, call: Callable[[], Any]) -> tuple[Any, str]:
        """Call NIXL; returns (result, error).

        NOTE: an exception's traceback holds the agent, which would live on while it is handled.
        """
        try:
            return call(), ""
        except Exception as error:
            return None, f"NIXL: {error!r}"

    def _new_agent(self, purpose: str) -> Any:
        name = f"diptych-{purpose}-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            agent = self._api.nixl_agent(name, self._api.nixl_agent_config(backends=["UCX"]))
            agent.register_memory([self._side.region()], mem_type=self._side.mem_type)
        except Exception as error:
            raise TransferError(f"NIXL does not start: {error!r}") from error
        return agent

    def _open_reader(self) -> None:
        self._reader = self._new_agent("read")
        table = self._side.descriptors(self._descriptor_bytes)
        self._own_descriptors, error = self._try(
            lambda: self._reader.prep_xfer_dlist(_LOCAL, table, mem_type=self._side.mem_type)
        )
        if error:
            raise TransferError(f"NIXL can't use the KV pool: {error}")

    def _close_reader(self) -> None:
        """End the UCX worker and with it every READ."""
        for peer in self._peers.values():
            peer.drop_descriptors()
            for read in peer.reads:
                read.drop_handle()
        if self._own_descriptors is not None:
            self._own_descriptors.release()
            self._own_descriptors = None
        agent = None if self._reader is None else weakref.ref(self._reader)
        self._reader = None
        if agent is not None and agent() is not None:
            gc.collect()
            assert agent() is None, "something holds the reading agent, so its READs may go on"

    def _add(self, peer: _Peer) -> str:
        """Make the reading agent know a peer; returns why it can't, or nothing."""

        def add() -> None:
            name = self._reader.add_remote_agent(peer.metadata)
            peer.agent_name = name.decode() if isinstance(name, bytes) else name
            table = peer.side.descriptors(self._descriptor_bytes)
            peer.descriptors = self._reader.prep_xfer_dlist(
                peer.agent_name, table, mem_type=peer.side.mem_type
            )

        return self._try(add)[1]

    def _replace_reader(self) -> None:
        """End every READ, then start those of the peers that are not lost again."""
        self._close_reader()
        try:
            self._open_reader()
        except TransferError as error:
            log.error("KV transfer is down until a peer connects: %s", error)
            for peer in self._peers.values():
                peer.lose(error.message)
            return
        for peer in self._peers.values():
            if not peer.lost:
                error_text = self._add(peer)
                if error_text:
                    peer.lose(error_text)
        for peer in list(self._peers.values()):
            for read in list(peer.reads):
                # A post that fails replaces the agent again, and starts the others itself.
                if read.state is ReadState.PENDING and read.handle is None and not peer.lost:
                    self._post(read)

    # READs.

    def _indices(self, ids: Sequence[int]) -> Indices:
        first = np.asarray(ids, dtype=np.int32) * np.int32(self._per_block)
        pieces = np.arange(self._per_block, dtype=np.int32)
        return (first[:, None] + pieces[None, :]).reshape(-1)

    def _post(self, read: NixlRead) -> None:
        def post() -> str:
            read.handle = self._reader.make_prepped_xfer(
                "READ", self._own_descriptors, read.own, read.peer.descriptors, read.remote
            )
            return str(self._reader.transfer(read.handle))

        state, error = self._try(post)
        self._take(read, state, error)

    def _take(self, read: NixlRead, state: str | None, error: str) -> None:
        if state == "DONE":
            read.peer.reads.discard(read)
            read.drop_handle()
            read.finish("")
        elif state != "PROC":
            self._lose(read.peer, error or f"NIXL: a READ ended with {state}")

    def _lose(self, peer: _Peer, error: str) -> None:
        """Give a peer up; its READs are seen FAILED only after nothing can land from them."""
        peer.lost = peer.lost or error
        if peer.reads:
            self._replace_reader()
        peer.lose(error)
