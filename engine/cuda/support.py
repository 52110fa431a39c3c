"""What this machine's GPU software can do, asked once when layers and backends are built."""

import importlib.util
from functools import cache

import torch


def has_triton(device: torch.device) -> bool:
    """True if Triton kernels can run on tensors of `device`."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """True if a kernel may start before the one that it waits for has ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
