"""Attention in plain torch operations: the reference on any device and the fast path on a CPU.

Within a block, one head's K of one layer is consecutive memory, so reading a context is copying
whole rows of [block_size * head_dim] by one index_select; the kernels then see dense K and V.
No loop runs over tokens in a forward pass; decodes of similar length are one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.attention.interface import AttentionSpan
from engine.kv.pool import KVPool

_MAX_PADDING = 1.5
"""Decodes share a call while padding to the longest reads at most this times what is needed."""


class TorchNativeBackend:
    """Plans steps over one pool."""

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        """Bind to the pool of a model with `num_heads` query heads."""
        layout = pool.layout
        self._pool = pool
        self._num_heads = num_heads
        self._num_kv_heads = layout.num_kv_heads
        self._num_layers = layout.num_layers
        self._block_size = layout.block_size
        self._head_dim = layout.head_dim
        self._device = pool.tensor.device
        self._token_rows = pool.tensor.view(-1, layout.head_dim)
        self._block_rows = pool.tensor.view(-1, layout.block_size * layout.head_dim)
        # Within a block, rows of K and then of V of one layer, all heads: [2, Hkv].
        self._kv_head_rows = torch.arange(2 * layout.num_kv_heads, device=self._device).view(2, -1)
        self._layer_rows = torch.arange(layout.num_layers, device=self._device) * (
            2 * layout.num_kv_heads
        )

    def plan(self, spans: Sequence[AttentionSpan]) -> "TorchNativeStep":
        """See AttentionBackend."""
        pieces: list[_Decodes | _Prompt] = []
        row = index = 0
        while index < len(spans):
            span = spans[index]
            count = 1
            if span.length == 1:
                count = self._num_together(spans, index)
                pieces.append(self._plan_decodes(spans[index : index + count], row))
            else:
                pieces.append(self._plan_prompt(span, row))
            row += span.length * count
            index += count
        return TorchNativeStep(
            pieces=pieces,
            num_rows=row,
            num_heads=self._num_heads,
            token_rows=self._token_rows,
            block_rows=self._block_rows,
            write_rows=self._write_rows(spans),
        )

    def _num_together(self, spans: Sequence[AttentionSpan], first: int) -> int:
        """How many single-row spans from `first` on share a call; at least one."""
        longest = needed = count = 0
        for span in spans[first:]:
            if span.length > 1:
                break
            width = -(-span.context_len // self._block_size)
            longest, needed = max(longest, width), needed + width
            if longest * (count + 1) > _MAX_PADDING * needed:
                break
            count += 1
        return count

    def _write_rows(self, spans: Sequence[AttentionSpan]) -> torch.Tensor:
        """Rows of `token_rows` that this step writes: [L, 2, T, Hkv]."""
        size = self._block_size
        slots: list[int] = []
        for span in spans:
            for index in range(span.start // size, -(-span.context_len // size)):
                low = max(span.start - index * size, 0)
                high = min(span.context_len - index * size, size)
                block_start = span.block_table[index] * size
                slots.extend(range(block_start + low, block_start + high))
        slot = torch.tensor(slots, device=self._device)
        block, offset = slot // size, slot % size
        first = block * (self._num_layers * 2 * self._num_kv_heads)  # [T]
        heads = first[None, :, None] + self._kv_head_rows[:, None, :]  # [2, T, Hkv]
        layers = heads + self._layer_rows[:, None, None, None]
        return layers * size + offset[:, None]

    def _read_rows(self, tables: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rows of `block_rows` with K and V of some sequences: [L, 2 * B * Hkv * num_blocks]."""
        block = torch.tensor(tables, device=self._device)  # [B, n]
        first = block * (self._num_layers * 2 * self._num_kv_heads)
        heads = first[None, :, None, :] + self._kv_head_rows[:, None, :, None]  # [2, B, Hkv, n]
        return (heads + self._layer_rows[:, None, None, None, None]).flatten(1)

    def _plan_decodes(self, spans: Sequence[AttentionSpan], row: int) -> "_Decodes":
        lengths = [span.context_len for span in spans]
        longest = max(lengths)
        width = -(-longest // self._block_size)
        tables = []
        for span in spans:
            used = list(span.block_table[: -(-span.context_len // self._block_size)])
            # Padding reads this sequence's own last block again; the mask hides it.
            tables.append(used + used[-1:] * (width - len(used)))
        mask = None
        if len(spans) > 1:
            ends = torch.tensor(lengths, device=self._device)
            hidden = torch.arange(longest, device=self._device) >= ends[:, None]
            mask = torch.zeros(hidden.shape, dtype=self._token_rows.dtype, device=self._device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return _Decodes(
            row=row,
            shape=(2, len(spans), self._num_kv_heads, width * self._block_size, self._head_dim),
            context_len=longest,
            read_rows=self._read_rows(tables),
            mask=mask,
        )

    def _plan_prompt(self, span: AttentionSpan, row: int) -> "_Prompt":
        if span.start == 0:
            return _Prompt(row=row, length=span.length, context_len=span.length)
        width = -(-span.context_len // self._block_size)
        query = torch.arange(span.start, span.context_len, device=self._device)
        hidden = torch.arange(span.context_len, device=self._device) > query[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._token_rows.dtype, device=self._device)
        return _Prompt(
            row=row,
            length=span.length,
            context_len=span.context_len,
            shape=(2, 1, self._num_kv_heads, width * self._block_size, self._head_dim),
            read_rows=self._read_rows([span.block_table[:width]]),
            mask=mask.masked_fill_(hidden, float("-inf")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decodes:
    """Single-row spans that are one call."""

    row: int
    shape: tuple[int, int, int, int, int]
    """Of K and V as gathered: [2, B, Hkv, padded context, D]."""
    context_len: int
    read_rows: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """One span of several rows. Without `read_rows` its context is exactly those rows."""

    row: int
    length: int
    context_len: int
    shape: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    read_rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchNativeStep:
    """Attention of one step. See AttentionStep."""

    pieces: "Sequence[_Decodes | _Prompt]"
    num_rows: int
    num_heads: int
    token_rows: torch.Tensor
    block_rows: torch.Tensor
    write_rows: torch.Tensor

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int
    ) -> torch.Tensor:
        """See AttentionStep."""
        write = self.write_rows[layer]
        self.token_rows.index_put_((write[0],), key)
        self.token_rows.index_put_((write[1],), value)
        if len(self.pieces) == 1:
            return self._attend(self.pieces[0], query, key, value, layer)
        out = query.new_empty(self.num_rows, self.num_heads * query.shape[-1])
        for piece in self.pieces:
            result = self._attend(piece, query, key, value, layer)
            out[piece.row : piece.row + len(result)] = result
        return out

    def _attend(
        self,
        piece: "_Decodes | _Prompt",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
    ) -> torch.Tensor:
        if isinstance(piece, _Decodes):
            return self._decode(piece, query, layer)
        rows = slice(piece.row, piece.row + piece.length)
        heads = query[rows].transpose(0, 1)[None]  # [1, Hq, T, D]
        if piece.read_rows is None:
            context_key = key[rows].transpose(0, 1)[None]
            context_value = value[rows].transpose(0, 1)[None]
        else:
            context_key, context_value = self._read(piece.read_rows[layer], piece)
        out = functional.scaled_dot_product_attention(
            heads,
            context_key,
            context_value,
            attn_mask=piece.mask,
            is_causal=piece.mask is None,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).flatten(1)

    def _decode(self, piece: _Decodes, query: torch.Tensor, layer: int) -> torch.Tensor:
        _, batch, num_kv_heads, _, head_dim = piece.shape
        key, value = self._read(piece.read_rows[layer], piece)
        # Query heads that share a KV head are rows of one product: no copy of K and V per head.
        grouped = query[piece.row : piece.row + batch].reshape(batch, num_kv_heads, -1, head_dim)
        out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=piece.mask)
        return out.reshape(batch, -1)

    def _read(
        self, rows: torch.Tensor, piece: "_Decodes | _Prompt"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gathered = self.block_rows.index_select(0, rows).view(piece.shape)
        key, value = gathered[:, :, :, : piece.context_len].unbind(0)
        return key, value
