"""READs from one peer by an agent of NIXL that does nothing else.

Made by the transport, used and closed by the peer's thread (`peer_reads.py`). Invariant: when
`close` has returned the agent is gone, and nothing that it was asked to read can land any more.
"""

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import TransferError
from kvtransfer.cuda_driver import use_gpu
from kvtransfer.nixl_agent import new_agent
from kvtransfer.nixl_pool import NixlPool
from kvtransfer.transport import Piece

_LOCAL = "NIXL_INIT_AGENT"
_SOLE_OWNER = 2
"""sys.getrefcount of an object that only the asking function holds."""
_SPINS = 50
_POLL_S = 0.0003
"""Between two looks at a READ, after the first few."""


class NixlChannel:
    """An agent that reads one peer's pool; see `channel.Channel`."""

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

    def open(self) -> bool:
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
        return False

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


def _release(handle: Any) -> None:
    if handle is not None:
        with contextlib.suppress(Exception):
            handle.release()
