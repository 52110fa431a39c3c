"""How one KV block lies in memory: what engine, transport and router must agree on."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """A block is [num_layers, 2 (K, V), num_kv_heads, block_size, head_dim], contiguous.

    Workers exchange KV only if the blocks of the whole model, with the heads of all ranks, have
    equal layouts; each rank holds its share of the heads.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens per block."""
    dtype: str
    """As torch names it, without the prefix."""
    block_bytes: int

    def with_heads(self, num_kv_heads: int) -> "KvLayout":
        """The same blocks with another number of heads."""
        block_bytes = self.block_bytes // self.num_kv_heads * num_kv_heads
        return replace(self, num_kv_heads=num_kv_heads, block_bytes=block_bytes)
