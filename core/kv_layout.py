"""How one KV block lies in memory: what engine, transport and router must agree on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """A block is [num_layers, 2 (K, V), num_kv_heads, block_size, head_dim], contiguous.

    Blocks move only between equal layouts.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens per block."""
    dtype: str
    """As torch names it, without the prefix."""
    block_bytes: int
