"""Chooses the attention backend for a model on a device."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Literal

import torch

from core.errors import ConfigError
from engine.config import EngineConfig
from engine.models.config import ModelConfig

_FLASHINFER_HEAD_DIMS = (64, 128, 256)


def is_installed(package: str) -> bool:
    """True if a package could be imported."""
    return importlib.util.find_spec(package) is not None


def chosen_backend(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    installed: Callable[[str], bool] = is_installed,
) -> Literal["torch_native", "flashinfer"]:
    """What `config.attention_backend` comes to.

    Args:
        config: of the engine.
        model: as this rank computes it.
        dtype: of weights and KV.
        device: of this rank.
        installed: tells of a package whether it is there.

    Raises:
        ConfigError: flashinfer was asked for by name and can't be had.
    """
    if config.attention_backend == "torch_native":
        return "torch_native"
    obstacle = _obstacle(model, dtype, device, installed)
    if obstacle is None:
        return "flashinfer"
    if config.attention_backend == "flashinfer":
        raise ConfigError(
            f"attention_backend flashinfer can't be used: {obstacle} Or set it to auto."
        )
    if device.type == "cuda":
        logging.getLogger(__name__).warning(
            "attention runs in plain torch, several times slower than with FlashInfer: %s", obstacle
        )
    return "torch_native"


def _obstacle(
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    installed: Callable[[str], bool],
) -> str | None:
    """Why FlashInfer can't serve this model here, and what to do about it."""
    if device.type != "cuda":
        return f"it needs a GPU, and the device is {device}; set device to cuda."
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {dtype}; set dtype to bfloat16."
    if model.head_dim not in _FLASHINFER_HEAD_DIMS:
        return f"it has no kernels for heads of {model.head_dim} elements."
    missing = [name for name in ("flashinfer", "triton") if not installed(name)]
    if missing:
        return f"not installed: {', '.join(missing)}; install diptych with the extra 'gpu'."
    return None
