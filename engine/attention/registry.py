"""Finds an attention backend by name; imports only that one."""

from engine.attention.interface import AttentionBackend
from engine.kv.pool import KVPool


def make_attention_backend(name: str, pool: KVPool, num_heads: int) -> AttentionBackend:
    """Build the backend `name`; `auto` takes the best for the pool's device."""
    match name:
        case "auto" | "torch_native":
            from engine.attention.torch_native import TorchNativeBackend

            return TorchNativeBackend(pool, num_heads)
    raise AssertionError(f"unknown attention backend {name}")
