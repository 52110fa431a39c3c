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
    """Bytes of all matrices, which is what one decode step reads at least.

    The LM head counts, an embedding of its own does not: a step reads few rows of it.
    """
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * config.hidden_size
    mlp = 3 * config.intermediate_size * config.hidden_size
    elements = config.num_layers * (heads + mlp) + config.vocab_size * config.hidden_size
    return elements * dtype.itemsize
