"""The compiled step against torch's layers: same logits, same K and V in the same places."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.interface import AttentionSpan
from engine.attention.torch_native import TorchNativeBackend
from engine.config import EngineConfig
from engine.kernels.decode import MAX_ROWS, CompiledDecode, make_compiled_decode
from engine.kv.pool import KVPool, kv_layout
from engine.layers.context import TorchContext
from engine.layers.decoder import DecoderModel
from engine.layers.rope import RotaryEmbedding
from engine.loader.load import load_model
from engine.models.config import read_model_config
from engine.parallel.group import Alone
from engine.plan import Chunk
from tests.support.models import make_checkpoint

NUM_BLOCKS = 120


class World:
    """One model with its pool, and both ways to compute."""

    def __init__(self, folder: Path, arch: str, block_size: int = 16, **overrides: Any) -> None:
        path = make_checkpoint(folder, arch, **overrides)
        self.config = read_model_config(path)
        cpu, dtype = torch.device("cpu"), torch.float32
        with torch.inference_mode():
            self.model: DecoderModel = load_model(
                path,
                self.config,
                EngineConfig(model=str(path)),
                group=Alone(),
                dtype=dtype,
                device=cpu,
            )
            self.rope = RotaryEmbedding(
                self.config.rope, self.config.head_dim, 256, dtype=dtype, device=cpu
            )
        self.pool = KVPool(kv_layout(self.config, block_size, dtype), NUM_BLOCKS, cpu)
        self.told: list[str] = []

    def compiled(self, num_threads: int = 2) -> CompiledDecode | None:
        return make_compiled_decode(
            self.model,
            self.config,
            self.pool,
            self.rope,
            num_threads=num_threads,
            progress=self.told.append,
        )

    def torch_logits(self, chunks: list[Chunk]) -> torch.Tensor:
        spans = [AttentionSpan(chunk.start, 1, chunk.block_table) for chunk in chunks]
        cos, sin = self.rope.rows(torch.tensor([chunk.start for chunk in chunks]))
        step = TorchNativeBackend(self.pool, self.config.num_heads).plan(spans)
        ids = torch.tensor([chunk.token_ids[0] for chunk in chunks])
        with torch.inference_mode():
            context = TorchContext(
                cos=cos,
                sin=sin,
                attention=step,
                num_heads=self.config.num_heads,
                num_kv_heads=self.config.num_kv_heads,
            )
            hidden = self.model.forward(ids, context)
            return self.model.logits(hidden)


def random_chunks(rng: random.Random, rows: int, block_size: int, vocab: int) -> list[Chunk]:
    """Rows whose contexts end before, at and after a block's end, in blocks of any order."""
    free = list(range(NUM_BLOCKS))
    rng.shuffle(free)
    chunks = []
    for row in range(rows):
        start = rng.choice([0, 1, block_size - 1, block_size, 2 * block_size + 3])
        table = [free.pop() for _ in range(start // block_size + 1)]
        chunks.append(Chunk(str(row), [rng.randrange(vocab)], start, table, None))
    return chunks


@pytest.mark.parametrize(
    ("arch", "heads", "kv_heads", "block_size"),
    [
        ("LlamaForCausalLM", 4, 2, 16),
        ("LlamaForCausalLM", 9, 3, 4),
        ("Qwen2ForCausalLM", 4, 4, 8),
        ("Qwen3ForCausalLM", 6, 1, 32),
    ],
)
def test_compiled_step_equals_torch_layers(
    tmp_path: Path, arch: str, heads: int, kv_heads: int, block_size: int
) -> None:
    world = World(
        tmp_path, arch, block_size, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    rng = random.Random(heads)
    torch.manual_seed(heads)
    for num_threads in (1, 2):
        compiled = world.compiled(num_threads)
        assert compiled is not None
        for rows in (1, 2, 3, 8, 13):
            chunks = random_chunks(rng, rows, block_size, world.config.vocab_size)
            before = torch.randn_like(world.pool.tensor)
            world.pool.tensor.copy_(before)
            expected = world.torch_logits(chunks)
            written = world.pool.tensor.clone()
            world.pool.tensor.copy_(before)
            logits = compiled.logits(chunks)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(world.pool.tensor, written, atol=1e-4, rtol=1e-4)


def test_warm_up_leaves_the_pool_zero(tmp_path: Path) -> None:
    world = World(tmp_path, "LlamaForCausalLM")
    assert world.compiled() is not None
    assert not world.pool.tensor.any()


def test_takes_single_tokens_of_few_sequences(tmp_path: Path) -> None:
    compiled = World(tmp_path, "LlamaForCausalLM").compiled()
    assert compiled is not None
    one, two = Chunk("a", [1], 0, [0], None), Chunk("b", [1, 2], 0, [1], None)
    assert compiled.takes([one] * MAX_ROWS)
    assert not compiled.takes([one] * (MAX_ROWS + 1))
    assert not compiled.takes([one, two])


def test_without_numba_there_is_no_compiled_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, "LlamaForCausalLM")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert world.compiled() is None


def test_shapes_that_tiles_do_not_cover_are_left_to_torch(tmp_path: Path) -> None:
    assert World(tmp_path, "LlamaForCausalLM", block_size=6).compiled() is None
    assert World(tmp_path / "b", "LlamaForCausalLM", intermediate_size=100).compiled() is None


def test_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, "LlamaForCausalLM")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert world.compiled() is None
    assert "can't be written" in world.told[-1]
