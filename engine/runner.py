"""Runs step plans on one device of this process: the hands of the scheduler's brain.

The engine loop's thread is the only caller. A plan is taken as it is: that blocks are allocated,
hold what the plan says they hold, and are not written by two chunks is the scheduler's promise.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from core.errors import ConfigError
from core.modelfile.digest import model_digest
from core.modelfile.resolve import resolve_model, silent
from core.tokens import TokenLogprobs
from engine.attention.interface import AttentionBackend, AttentionSpan
from engine.attention.registry import make_attention_backend
from engine.config import EngineConfig
from engine.kernels.decode import CompiledDecode, make_compiled_decode
from engine.kv.pool import KVPool, kv_layout, num_pool_blocks
from engine.layers.context import ForwardContext
from engine.layers.decoder import DecoderModel
from engine.layers.rope import RotaryEmbedding
from engine.loader.load import load_model
from engine.models.config import ModelConfig, read_model_config
from engine.plan import Chunk, StepPlan, StepResult
from engine.sampler.sampler import sample
from engine.threads import apply_num_threads


class Executor(Protocol):
    """Executes steps, on however many devices."""

    @property
    def model_config(self) -> ModelConfig:
        """What is served."""
        ...

    @property
    def model_digest(self) -> bytes:
        """16 bytes that identify configuration and weights; see core.modelfile.digest."""
        ...

    @property
    def pool(self) -> KVPool:
        """Memory of the KV blocks that plans speak of."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a step; returns when its tokens are known."""
        ...

    def close(self) -> None:
        """Free the device. Idempotent."""
        ...


class InProcessExecutor:
    """The Executor of one device."""

    def __init__(
        self,
        *,
        model: DecoderModel,
        model_config: ModelConfig,
        model_digest: bytes,
        pool: KVPool,
        attention: AttentionBackend,
        rope: RotaryEmbedding,
        compiled: CompiledDecode | None = None,
    ) -> None:
        """Put the parts together; `build_executor` makes them."""
        self._model: DecoderModel | None = model
        self._model_config = model_config
        self._model_digest = model_digest
        self._pool = pool
        self._attention = attention
        self._rope = rope
        self._compiled = compiled
        self._device = pool.tensor.device

    @property
    def model_config(self) -> ModelConfig:
        """See Executor."""
        return self._model_config

    @property
    def model_digest(self) -> bytes:
        """See Executor."""
        return self._model_digest

    @property
    def pool(self) -> KVPool:
        """See Executor."""
        return self._pool

    def execute(self, plan: StepPlan) -> StepResult:
        """See Executor."""
        with torch.inference_mode():
            return self._execute(plan.chunks)

    def close(self) -> None:
        """See Executor. The pool's memory stays until nobody refers to it."""
        self._model = self._compiled = None

    def _execute(self, chunks: Sequence[Chunk]) -> StepResult:
        assert self._model is not None, "execute after close"
        if self._compiled is not None and self._compiled.takes(chunks):
            rows = [i for i, chunk in enumerate(chunks) if chunk.sample is not None]
            logits = self._compiled.logits(chunks)
            return _sample(chunks, rows, logits if len(rows) == len(chunks) else logits[rows])
        # Decodes first and by length: attention batches neighbours of similar length.
        order = sorted(
            range(len(chunks)),
            key=lambda i: (len(chunks[i].token_ids) > 1, chunks[i].start),
        )
        spans: list[AttentionSpan] = []
        token_ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        last_rows: list[int] = []
        for index in order:
            chunk = chunks[index]
            length = len(chunk.token_ids)
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + length))
            spans.append(AttentionSpan(chunk.start, length, chunk.block_table))
            if chunk.sample is not None:
                sampled.append(index)
                last_rows.append(len(token_ids) - 1)
        cos, sin = self._rope.rows(self._tensor(positions))
        context = ForwardContext(cos=cos, sin=sin, attention=self._attention.plan(spans))
        hidden = self._model.forward(self._tensor(token_ids), context)
        if sampled and len(sampled) < len(token_ids):
            hidden = hidden.index_select(0, self._tensor(last_rows))
        return _sample(chunks, sampled, self._model.logits(hidden) if sampled else hidden)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)


def _sample(chunks: Sequence[Chunk], sampled: Sequence[int], logits: torch.Tensor) -> StepResult:
    """Sample for the chunks whose indices are given, from one row of logits each."""
    ids: list[int | None] = [None] * len(chunks)
    logprobs: list[TokenLogprobs | None] = [None] * len(chunks)
    if sampled:
        specs = [spec for i in sampled if (spec := chunks[i].sample) is not None]
        for index, result in zip(sampled, sample(logits, specs), strict=True):
            ids[index], logprobs[index] = result.token_id, result.logprobs
    return StepResult(ids, logprobs)


def build_executor(
    config: EngineConfig, progress: Callable[[str], None] = silent
) -> InProcessExecutor:
    """Load the model, reserve the KV pool and join them.

    Args:
        config: of the engine.
        progress: told before each slow stage.

    Raises:
        ConfigError: the model can't be found, is not supported or does not fit the settings.
    """
    num_threads = apply_num_threads(config.num_threads)
    path = resolve_model(config.model, progress)
    model_config = read_model_config(path)
    max_len = config.max_model_len or model_config.max_position
    if max_len > model_config.max_position:
        raise ConfigError(
            f"max_model_len is {max_len}, but the model knows positions up to "
            f"{model_config.max_position}; give at most that."
        )
    device = torch.device(config.device)
    dtype = _dtype(config, model_config, device)
    progress("loading the weights")
    dummy = config.load_format == "dummy"
    with torch.inference_mode():
        model = load_model(path, model_config, config, dtype=dtype, device=device)
        rope = RotaryEmbedding(
            model_config.rope, model_config.head_dim, max_len, dtype=dtype, device=device
        )
    # Not in inference mode: whoever fills blocks from outside must be allowed to write the tensor.
    layout = kv_layout(model_config, config.block_size, dtype)
    pool = KVPool(layout, num_pool_blocks(config, layout), device)
    attention = make_attention_backend(config.attention_backend, pool, model_config.num_heads)
    compiled = None
    if config.attention_backend == "auto":
        compiled = make_compiled_decode(
            model, model_config, pool, rope, num_threads=num_threads, progress=progress
        )
    return InProcessExecutor(
        model=model,
        model_config=model_config,
        model_digest=model_digest(path, dummy_seed=config.seed if dummy else None),
        pool=pool,
        attention=attention,
        rope=rope,
        compiled=compiled,
    )


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        name = "float32" if device.type == "cpu" else model.dtype
    else:
        name = config.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype
