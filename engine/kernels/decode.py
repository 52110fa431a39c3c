"""The compiled way to run a step in which every sequence has one token.

The runner asks `takes` per step and computes with torch's layers whatever is not taken. Weights
and pool are shared with those layers, not copied; results differ only by the order of sums.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from core.modelfile.cache import models_cache_dir
from engine.kernels.compiled_once import LOCK, compiled_once
from engine.kv.pool import KVPool
from engine.layers.decoder import DecoderLayer, DecoderModel
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rope import RotaryEmbedding
from engine.models.config import ModelConfig
from engine.plan import Chunk

if TYPE_CHECKING:
    from engine.kernels.decode_layer import Buffers, LayerWeights

MAX_ROWS = 32
"""Steps of SmolLM2-135M on 2 cores, against torch's layers: 19.8 to 28.2 ms with one row, 27.7
to 45.2 with 8, 43 to 54 with 16, 71 to 70 with 32; with contexts of 1000, 168 to 201 with 32."""

_UNIT = 16


def make_compiled_decode(
    model: DecoderModel,
    config: ModelConfig,
    pool: KVPool,
    rope: RotaryEmbedding,
    *,
    num_threads: int,
    progress: Callable[[str], None],
) -> "CompiledDecode | None":
    """Compile, or load what was compiled before; None where that can't be or would not pay."""
    if not _suits(config, pool) or importlib.util.find_spec("numba") is None:
        return None
    import numba

    folder = models_cache_dir().parent / "kernels" / _source_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        progress(f"no compiled CPU kernels: {folder} can't be written ({error})")
        return None
    # Before the functions are declared; the compiler's own check sees changes of one file only.
    settings: Any = numba.config  # its names are made at run time
    settings.CACHE_DIR = str(folder)
    decode = CompiledDecode(model, config, pool, rope, num_threads)
    with compiled_once(folder, "CPU kernels", progress):
        decode.warm_up()
    return decode


def _suits(config: ModelConfig, pool: KVPool) -> bool:
    lengths = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    return (
        config.experts is None
        and pool.tensor.device.type == "cpu"
        and pool.tensor.dtype == torch.float32
        and all(length % _UNIT == 0 for length in lengths)
        and config.head_dim % _UNIT == 0
        and pool.layout.block_size % 4 == 0
        and config.vocab_size % 4 == 0
    )


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class CompiledDecode:
    """Views of one model's weights and pool, and buffers by number of rows."""

    def __init__(
        self,
        model: DecoderModel,
        config: ModelConfig,
        pool: KVPool,
        rope: RotaryEmbedding,
        num_threads: int,
    ) -> None:
        """Bind; `make_compiled_decode` checks first that the model suits."""
        import numba

        from engine.kernels import decode_layer

        self._code = decode_layer
        self._set_num_threads = numba.set_num_threads
        settings: Any = numba.config
        # NOTE: not get_num_threads, which another engine of this thread may have lowered.
        self._parts = min(num_threads, settings.NUMBA_NUM_THREADS)
        self._config = config
        self._embedding = _view(model.embedding)
        self._layers = [self._weights(layer) for layer in model.layers]
        self._norm = _view(model.norm.scaled_weight)
        self._head = _view(model.lm_head.weight)
        self._floors = (
            config.hidden_size * config.rms_norm_eps,
            config.head_dim * config.rms_norm_eps,
        )
        blocks = _view(pool.tensor)
        self._layer_blocks = [blocks[:, layer] for layer in range(config.num_layers)]
        self._cos, self._sin = _view(rope.cos[:, 0]), _view(rope.sin[:, 0])
        self._block_size = pool.layout.block_size
        self._buffers: dict[int, Buffers] = {}

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether `logits` can compute this step."""
        return len(chunks) <= MAX_ROWS and all(
            len(chunk.token_ids) == 1 and chunk.score is None for chunk in chunks
        )

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute a step of single tokens; writes their K and V into the pool.

        Returns:
            [len(chunks), vocab_size], float32.
        """
        counts = [chunk.start // self._block_size + 1 for chunk in chunks]
        tables = np.zeros((len(chunks), max(counts)), np.int64)
        for row, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
            tables[row, :count] = chunk.block_table[:count]
        positions = np.array([chunk.start for chunk in chunks], np.int64)
        token_ids = np.array([chunk.token_ids[0] for chunk in chunks], np.int64)
        return torch.from_numpy(self._run(token_ids, positions, tables))

    def warm_up(self) -> None:
        """Have everything compiled. The token written is one that no sequence has yet."""
        self._run(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, 1), np.int64))
        for blocks in self._layer_blocks:
            blocks[0, :, :, 0] = 0

    def _run(
        self,
        token_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        tables: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        # Per calling thread, and cheap.
        self._set_num_threads(self._parts)
        code, parts = self._code, self._parts
        buffers = self._buffers_for(code.rows_in_tiles(len(token_ids)))
        step = code.StepRows(self._cos[positions], self._sin[positions], tables, positions + 1)
        buffers.hidden[: len(token_ids)] = self._embedding[token_ids]
        for weights, blocks in zip(self._layers, self._layer_blocks, strict=True):
            code.decode_layer(weights, buffers, step, blocks, self._floors, parts)
        hidden, normed = buffers.hidden, buffers.normed
        logits = np.empty((len(hidden), len(self._head)), np.float32)
        code.project_logits(self._norm, self._floors[0], self._head, hidden, normed, logits, parts)
        return logits[: len(token_ids)]

    def _buffers_for(self, rows: int) -> "Buffers":
        found = self._buffers.get(rows)
        if found is None:
            config = self._config
            hidden, inner = config.hidden_size, config.intermediate_size
            query = config.num_heads * config.head_dim
            qkv = query + 2 * config.num_kv_heads * config.head_dim
            widths = (hidden, hidden, qkv, query, hidden, 2 * inner, inner)
            found = self._code.Buffers(*(np.zeros((rows, width), np.float32) for width in widths))
            self._buffers[rows] = found
        return found

    def _weights(self, layer: DecoderLayer) -> "LayerWeights":
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(mlp, GatedMLP)
        query_norm, key_norm = attention.norms or (None, None)
        return self._code.LayerWeights(
            _view(layer.input_norm.scaled_weight),
            _norm_weight(query_norm),
            _norm_weight(key_norm),
            *_linear_weights(attention.qkv),
            *_linear_weights(attention.output),
            _view(layer.mlp_norm.scaled_weight),
            *_linear_weights(mlp.gate_up),
            *_linear_weights(mlp.down),
        )


def _view(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.contiguous().numpy()
    return array


def _norm_weight(norm: RMSNorm | None) -> npt.NDArray[np.float32]:
    return np.zeros(0, np.float32) if norm is None else _view(norm.scaled_weight)


def _linear_weights(linear: Linear) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    bias = np.zeros(0, np.float32) if linear.bias is None else _view(linear.bias)
    return _view(linear.weight), bias
