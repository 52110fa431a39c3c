"""Brings up the ranks of one model: children first, then rank 0's own share beside theirs.

Ranks of other nodes are started there, by others, who bring the pipes to them.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace

from core.errors import ConfigError
from core.modelfile.resolve import resolve_model
from engine.build import build_rank
from engine.config import EngineConfig
from engine.executor import Executor
from engine.models.config import read_model_config
from engine.parallel.children import RankProcesses
from engine.parallel.executor import MultiProcessExecutor
from engine.parallel.meeting import Meeting, start_message
from engine.parallel.peers import OtherNodes
from engine.parallel.shares import rank_device, rank_share, told_of_experts
from engine.parallel.torch_group import TorchGroup, make_store_fd
from engine.threads import compute_thread_env, rank_threads

RANK_MODULE = "engine.parallel.rank"
"""The process of a rank that does nothing beside its steps."""


def start_ranks(
    config: EngineConfig,
    progress: Callable[[str], None],
    rank_module: str = RANK_MODULE,
    elsewhere: OtherNodes | None = None,
) -> Executor:
    """Build the executor of `config.tensor_parallel_size` ranks.

    Args:
        config: of the engine.
        progress: told before each slow stage.
        rank_module: run with `python -m` as each other rank of this host; it calls `run_rank`.
        elsewhere: the ranks of other nodes, if there are.

    Raises:
        ConfigError: the model can't be found, is not supported, or can't be shared like this.
        WorkerLostError: a rank did not come up.
    """
    size = config.tensor_parallel_size
    if size < 1:
        raise ConfigError(f"tensor_parallel_size must be at least 1, got {size}.")
    if size % config.nodes:
        raise ConfigError(
            f"tensor_parallel_size is {size}, which {config.nodes} nodes can't share evenly."
        )
    assert config.nodes == 1 + (len(elsewhere.pipes) if elsewhere else 0), "a pipe to each node"
    # What is wrong with the settings is found before any process is started.
    path = resolve_model(config.model, progress)
    config = replace(config, model=str(path))
    model = read_model_config(path)
    rank_share(model, size)
    device = rank_device(config, 0)
    ranks = RankProcesses(config.rank_timeout_s)
    group: TorchGroup | None = None
    meeting = elsewhere.meeting if elsewhere else Meeting(store_fd=make_store_fd())
    told = replace(meeting, listen_fd=None)
    here = config.ranks_per_node
    try:
        progress(f"starting {here} of {size} ranks" if elsewhere else f"starting {size} ranks")
        if experts := told_of_experts(model, size):
            progress(experts)
        ranks.start(
            [sys.executable, "-m", rank_module],
            [start_message(config, rank, told) for rank in range(1, here)],
            env={**os.environ, **compute_thread_env(rank_threads(config) or 1)},
            store_fd=meeting.store_fd,
            nodes=elsewhere.pipes if elsewhere else (),
        )
        group = TorchGroup(
            0,
            size,
            device,
            meeting=meeting,
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
