"""Models and clients that every end-to-end test may ask for."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from core.modelfile.resolve import resolve_model
from tests.support.cluster import Cluster, cluster
from tests.support.models import make_checkpoint
from tests.support.oracle import Oracle
from tests.support.stream import LONG_PROMPT, LONG_TOKENS

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo model, fetched and converted once per machine."""
    return resolve_model("demo", print)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random checkpoints by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_checkpoint(folder, arch, max_position_embeddings=8192)
        for name, arch in ARCHITECTURES.items()
    }


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def plain(tiny_llama: Path) -> Iterator[Cluster]:
    """One worker of each role, set as users find them; whoever asks for it leaves it well."""
    with cluster(tiny_llama) as running:
        yield running
        running.wait_balanced()


@pytest.fixture(scope="session")
def slow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose prompts take long enough to be interrupted."""
    return make_checkpoint(
        tmp_path_factory.mktemp("slow"),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
    )


@pytest.fixture(scope="session")
def long_answer(slow_llama: Path) -> list[int]:
    """What that model must answer to a `Stream`."""
    oracle = Oracle(slow_llama)
    ids = oracle.tokenizer(LONG_PROMPT)["input_ids"]
    assert len(ids) > 600
    return oracle.greedy(ids, LONG_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def client(system: Cluster) -> Iterator[openai.OpenAI]:
    """Of the module's own `system`."""
    with system.openai() as one:
        yield one


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id
