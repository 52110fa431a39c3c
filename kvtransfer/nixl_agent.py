"""NIXL's Python API: found in whichever wheel is installed, and its agents made as we need them.

Called by the transport for the agent that serves, by each channel for the one that reads.
"""

import importlib
import os
import secrets
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from core.errors import TransferError
from kvtransfer.nixl_pool import NixlPool

_MODULES = ("nixl_cu13._api", "nixl_cu12._api", "nixl._api")
_PROGRESS_TIMEOUT_US = 5000
"""How long the serving agent's thread waits for events. NIXL's default, 0, spins: it took a whole
core, while 5 ms took nothing and served READs as fast."""


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
