"""Builds the executor that a configuration asks for: model, KV pool and what joins them."""

from collections.abc import Callable
from dataclasses import replace

import torch

from core.errors import ConfigError
from core.modelfile.digest import model_digest
from core.modelfile.resolve import resolve_model, silent
from engine.attention.registry import chosen_backend
from engine.attention.torch_native import TorchNativeBackend
from engine.config import EngineConfig
from engine.cuda.memory import explained
from engine.devices import usable_device
from engine.executor import Executor
from engine.kernels.decode import make_compiled_decode
from engine.kv.host_memory import check_host_settings, make_host_memory
from engine.kv.pool import KVPool, kv_layout, num_pool_blocks
from engine.layers.rope import RotaryEmbedding
from engine.loader.load import load_model
from engine.models.config import ModelConfig, read_model_config
from engine.parallel.group import Alone, RankGroup
from engine.parallel.peers import OtherNodes
from engine.parallel.shares import rank_device, rank_share
from engine.runner import TorchRunner
from engine.threads import apply_num_threads, rank_threads


def build_executor(
    config: EngineConfig,
    progress: Callable[[str], None] = silent,
    *,
    rank_module: str | None = None,
    elsewhere: OtherNodes | None = None,
) -> Executor:
    """Load the model, reserve the KV pool and join them, on every rank if there are several.

    Args:
        config: of the engine.
        progress: told before each slow stage.
        rank_module: the process of each rank above 0, if it does more than steps.
        elsewhere: the ranks that others have started, if there are several nodes.

    Raises:
        ConfigError: the model can't be found, is not supported or does not fit the settings.
        WorkerLostError: another rank could not do its part.
    """
    check_host_settings(config)
    config = replace(config, device=usable_device(config.device))
    if config.tensor_parallel_size == 1:
        return build_rank(config, Alone(), progress)
    from engine.parallel.start import RANK_MODULE, start_ranks

    return start_ranks(config, progress, rank_module or RANK_MODULE, elsewhere)


def build_rank(
    config: EngineConfig, group: RankGroup, progress: Callable[[str], None] = silent
) -> Executor:
    """Build the executor of one rank, in this process. Every rank of the group does so at once.

    Args:
        config: of the engine, the same on all ranks.
        group: whose ranks share the model.
        progress: told before each slow stage.

    Raises:
        ConfigError: see `build_executor`.
        WorkerLostError: another rank could not do its part.
    """
    num_threads = apply_num_threads(rank_threads(config))
    path = resolve_model(config.model, progress)
    model_config = read_model_config(path)
    share = rank_share(model_config, group.size)
    max_len = config.max_model_len or model_config.max_position
    if max_len > model_config.max_position:
        raise ConfigError(
            f"max_model_len is {max_len}, but {model_config.length_bound}; "
            f"give at most {model_config.max_position}."
        )
    if model_config.sliding_window is not None and config.max_model_len is None:
        progress(f"sequences of up to {max_len} tokens: {model_config.length_bound}")
    device = rank_device(config, group.rank)
    dtype = _dtype(config, model_config, device)
    progress("loading the weights")
    dummy = config.load_format == "dummy"
    flashinfer = chosen_backend(config, share, dtype, device) == "flashinfer"
    with torch.inference_mode(), explained("loading the weights", device):
        model = load_model(path, model_config, config, group=group, dtype=dtype, device=device)
    group.smallest(0)  # ranks meet here, so that no collective waits for one that still loads
    digest = model_digest(path, dummy_seed=config.seed if dummy else None)
    layout = kv_layout(share, config.block_size, dtype)
    if flashinfer:
        from engine.cuda.build import CudaParts, build_cuda_runner

        parts = CudaParts(
            config=config,
            model=model,
            model_config=model_config,
            share=share,
            model_digest=digest,
            layout=layout,
            device=device,
            max_len=max_len,
            smallest=group.smallest,
        )
        return build_cuda_runner(parts, progress)
    rope = RotaryEmbedding(
        model_config.rope, model_config.head_dim, max_len, dtype=dtype, device=device
    )
    # Not in inference mode: whoever fills blocks from outside must be allowed to write the tensor.
    pool = KVPool(layout, group.smallest(num_pool_blocks(config, layout)), device)
    pool.host_memory = make_host_memory(config, pool)
    attention = TorchNativeBackend(pool, share.num_heads)
    compiled = None
    if config.attention_backend == "auto" and group.size == 1:
        compiled = make_compiled_decode(
            model, model_config, pool, rope, num_threads=num_threads, progress=progress
        )
    return TorchRunner(
        model=model,
        model_config=model_config,
        model_digest=digest,
        pool=pool,
        attention=attention,
        rope=rope,
        num_heads=share.num_heads,
        compiled=compiled,
    )


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        name = "float32" if device.type == "cpu" else model.dtype
    else:
        name = config.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype
