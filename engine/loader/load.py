"""Builds a model with its weights."""

from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.layers.decoder import DecoderModel
from engine.loader.source import open_weights
from engine.models.config import ModelConfig
from engine.models.registry import model_class
from engine.parallel.group import RankGroup

_PACK_LIMIT_BYTES = 4 << 30
"""Models with more bytes of matrices are not packed: the second copy would cost too much."""


def load_model(
    path: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    *,
    group: RankGroup,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderModel:
    """Load this rank's share of a checkpoint.

    Raises:
        ConfigError: weights are missing, misshapen, left over or unreadable.
    """
    source = open_weights(
        path, config.load_format, group, dtype=dtype, device=device, seed=config.seed
    )
    pack = weight_bytes(model_config, dtype) <= _PACK_LIMIT_BYTES
    return model_class(model_config)(source, model_config, group, pack=pack)


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all matrices, which is what a decode step reads; with experts, a large one.

    The LM head counts, an embedding of its own does not: a step reads few rows of it.
    """
    experts = config.experts
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    rows = config.num_layers * heads + config.vocab_size
    if experts is None:
        rows += 3 * config.num_layers * config.intermediate_size
    else:
        layers = len(experts.layers)
        rows += 3 * (config.num_layers - layers) * config.intermediate_size
        rows += layers * experts.count * (3 * experts.intermediate_size + 1)  # 1: of the router
    return rows * config.hidden_size * dtype.itemsize
