"""Brings up the ranks of one model: children first, then rank 0's own share beside theirs."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

from core.errors import ConfigError
from core.modelfile.resolve import resolve_model
from engine.build import build_rank
from engine.config import EngineConfig
from engine.executor import Executor
from engine.models.config import read_model_config
from engine.parallel.children import RankProcesses
from engine.parallel.executor import MultiProcessExecutor
from engine.parallel.shares import rank_device, rank_share, rank_threads
from engine.parallel.torch_group import TorchGroup, make_store_fd
from engine.threads import compute_thread_env

RANK_MODULE = "engine.parallel.rank"
"""The process of a rank that does nothing beside its steps."""


def start_ranks(
    config: EngineConfig, progress: Callable[[str], None], rank_module: str = RANK_MODULE
) -> Executor:
    """Build the executor of `config.tensor_parallel_size` ranks.

    Args:
        config: of the engine.
        progress: told before each slow stage.
        rank_module: run with `python -m` as each other rank; it calls `run_rank`.

    Raises:
        ConfigError: the model can't be found, is not supported, or can't be shared like this.
        WorkerLostError: a rank did not come up.
    """
    size = config.tensor_parallel_size
    if size < 1:
        raise ConfigError(f"tensor_parallel_size must be at least 1, got {size}.")
    # What is wrong with the settings is found before any process is started.
    path = resolve_model(config.model, progress)
    config = replace(config, model=str(path))
    rank_share(read_model_config(path), size)
    device = rank_device(config, 0)
    ranks = RankProcesses(config.rank_timeout_s)
    group: TorchGroup | None = None
    store_fd = make_store_fd()
    try:
        progress(f"starting {size} ranks")
        ranks.start(
            [sys.executable, "-m", rank_module],
            [start_message(config, rank, store_fd) for rank in range(1, size)],
            env={**os.environ, **compute_thread_env(rank_threads(config) or 1)},
            store_fd=store_fd,
        )
        group = TorchGroup(
            0,
            size,
            device,
            store_fd=store_fd,
            timeout_s=config.start_timeout_s,
            check=ranks.check,
        )
        ranks.attach(group)
        local = build_rank(config, group, progress)
        ranks.wait_ready(config.start_timeout_s)
    except BaseException as error:
        try:
            # What stopped rank 0 may be that another rank could not go on.
            if isinstance(error, Exception):
                ranks.explain(error, f"Rank 0 could not start: {error}")
            ranks.fail("Rank 0 was told to stop.")
        finally:
            ranks.close()
            if group is not None:
                group.close()
        raise
    return MultiProcessExecutor(local, group, ranks)


def start_message(config: EngineConfig, rank: int, store_fd: int) -> bytes:
    """Body of the START frame of a rank."""
    return json.dumps({"config": asdict(config), "rank": rank, "store_fd": store_fd}).encode()
