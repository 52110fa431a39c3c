"""Which torch device a setting means on this machine."""

import torch

from core.errors import ConfigError


def usable_device(name: str) -> str:
    """The device itself; for `auto`, a GPU where this torch sees one, else the CPU.

    Raises:
        ConfigError: it is no device, or this torch has none such.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device is {name!r}; give auto, cpu, cuda, or one GPU as in cuda:0."
        ) from None
    if device.type == "cuda":
        _check_gpu(name, device.index or 0)
    return name


def _check_gpu(name: str, index: int) -> None:
    found = torch.cuda.device_count()
    if index < found:
        return
    if found:
        raise ConfigError(
            f"device is {name}, but {found} GPUs are visible, cuda:0 to cuda:{found - 1}; "
            "take one of them."
        )
    if torch.version.cuda is None:
        what = "is a build for CPUs: install one with CUDA, or set device cpu."
    else:
        what = (
            "sees no GPU: see that nvidia-smi lists one and CUDA_VISIBLE_DEVICES does not hide it, "
            "or set device cpu."
        )
    raise ConfigError(f"device is {name}, but torch {torch.__version__} {what}")
