"""Mooncake's transfer engine as this package uses it. Called by the channel and the transport.

Invariant: but for the first `post` to a target, nothing here waits for a peer.
"""

import importlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from core.errors import TransferError
from kvtransfer.mooncake_listener import shorten_accept

_PENDING, _DONE = 0, 1
"""What transfer_check_status answers; less than 0 is an error."""
_NO_BATCH = (0, -1, (1 << 64) - 1)
_SPINS = 50
_POLL_S = 0.0003
"""Between two looks at a piece, after the first few."""


def mooncake_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables to start an engine process with, so that Mooncake logs errors only; set ones stay.

    Args:
        environ: the variables as they are.
    """
    wanted = {"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"}
    return {name: value for name, value in wanted.items() if name not in environ}


def load_mooncake() -> Any:
    """Mooncake's module with TransferEngine.

    Raises:
        TransferError: it or a library that it needs is not installed.
    """
    try:
        return importlib.import_module("mooncake.engine")
    except (ImportError, OSError) as error:
        raise TransferError(
            f"Mooncake can't be imported: {error}. Install the extra diptych[mooncake] and the "
            "system's libibverbs1, libnuma1 and libcurl4, or set kv_transport to nixl or tcp."
        ) from error


def new_engine(api: Any, host: str) -> Any:
    """A Mooncake engine that peers reach at `host`, an IPv4 address of this machine.

    Raises:
        TransferError: it does not start.
    """
    engine = api.TransferEngine()
    # It takes RDMA if it finds a device, whatever the third argument; MC_FORCE_TCP prevents that.
    if engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
        raise TransferError(f"Mooncake does not start on {host}; its log says why.")
    shorten_accept(engine.get_rpc_port())
    return engine


def register(engine: Any, address: int, num_bytes: int) -> None:
    """Let an engine move bytes from and to memory.

    Raises:
        TransferError: it can't use that memory.
    """
    # The batch call, unlike register_memory, lets other threads run meanwhile.
    if engine.batch_register_memory([address], [num_bytes]):
        raise TransferError(
            f"Mooncake can't register the KV pool's {num_bytes} bytes; with RDMA, raise the limit "
            "of locked memory (ulimit -l)."
        )


def post(engine: Any, target: str, own: int, peer: int, num_bytes: int) -> int:
    """Start reading from a peer's address to an own one; the id to `wait` for.

    The first call for a target waits for its engine; later ones return at once.

    Raises:
        TransferError: Mooncake refuses.
    """
    # One batch per piece: of a batch with more, Mooncake can only be asked about the first
    # without waiting.
    batch: int = engine.batch_transfer_async_read(target, [own], [peer], [num_bytes])
    if batch in _NO_BATCH:
        raise TransferError(
            f"Mooncake can't reach {target}, its log says why; pods must reach each other on all "
            "ports."
        )
    return batch


def wait(engine: Any, batch: int, target: str, interrupted: threading.Event) -> None:
    """Look at what was posted until it is done.

    Raises:
        TransferError: it failed, or was interrupted.
    """
    looks = 0
    while not interrupted.is_set():
        state = engine.transfer_check_status(batch)
        if state == _DONE:
            return
        if state != _PENDING:
            raise TransferError(f"Mooncake failed a READ from {target} ({state})")
        looks += 1
        time.sleep(0 if looks < _SPINS else _POLL_S)
    raise TransferError("the peer was disconnected")
