"""Builds the runner of one GPU: measures what steps need, sizes the KV pool, captures graphs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from core.kv_layout import KvLayout
from engine.config import EngineConfig
from engine.cuda.attention import FlashInferAttention
from engine.cuda.graphs import batch_ladder
from engine.cuda.memory import affordable_blocks, explained, gpu_memory, peak_bytes
from engine.cuda.runner import CudaRunner, StepLimits
from engine.kv.host_memory import make_host_memory
from engine.kv.pool import KVPool, num_pool_blocks
from engine.layers.decoder import DecoderModel
from engine.layers.rope import cos_sin_table
from engine.limits import engine_limits
from engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaParts:
    """What the runner is made of and the pool's size depends on."""

    config: EngineConfig
    model: DecoderModel
    model_config: ModelConfig
    share: ModelConfig
    """The model as this rank computes it."""
    model_digest: bytes
    layout: KvLayout
    device: torch.device
    max_len: int
    """Longest sequence in tokens."""
    smallest: Callable[[int], int]
    """The least of all ranks' numbers of blocks; see RankGroup."""


def build_cuda_runner(parts: CudaParts, progress: Callable[[str], None]) -> CudaRunner:
    """Make the runner.

    Raises:
        ConfigError: the GPU's memory does not suffice; says what to change.
    """
    config, device = parts.config, parts.device
    torch.cuda.set_device(device)
    cos_sin = cos_sin_table(
        parts.model_config.rope, parts.model_config.head_dim, parts.max_len, device
    )
    asked = engine_limits(config, gpu=True)
    limits = StepLimits(
        max_tokens=asked.max_step_tokens,
        max_rows=asked.max_num_seqs,
        max_table_entries=asked.max_num_seqs * -(-parts.max_len // config.block_size),
    )

    def runner(pool: KVPool, *, cuda_graphs: bool) -> CudaRunner:
        return CudaRunner(
            model=parts.model,
            model_config=parts.model_config,
            model_digest=parts.model_digest,
            attention=FlashInferAttention(pool, parts.share.num_heads),
            pool=pool,
            cos_sin=cos_sin,
            limits=limits,
            cuda_graphs=cuda_graphs,
        )

    def rehearse() -> None:
        trial = runner(KVPool(parts.layout, 1, device), cuda_graphs=False)
        trial.rehearse(limits.max_tokens, parts.max_len)

    if config.num_blocks is None and config.kv_cache_bytes is None:
        progress("measuring what the largest steps need")
        with explained("running the largest step", device):
            step_bytes = peak_bytes(device, rehearse)
        num_blocks = affordable_blocks(
            parts.layout,
            gpu_memory(device),
            utilization=config.gpu_memory_utilization,
            step_bytes=step_bytes,
            num_graphs=len(batch_ladder(limits.max_rows)) if config.cuda_graphs else 0,
            max_len=parts.max_len,
        )
    else:
        num_blocks = num_pool_blocks(config, parts.layout)
    with explained("reserving the KV pool", device):
        built = runner(
            KVPool(parts.layout, parts.smallest(num_blocks), device),
            cuda_graphs=config.cuda_graphs,
        )
    if config.host_kv_bytes:
        progress("pinning host memory for KV")
        built.pool.host_memory = make_host_memory(config, built.pool)
    with explained("capturing CUDA graphs", device):
        built.warm_up(progress)
    return built
