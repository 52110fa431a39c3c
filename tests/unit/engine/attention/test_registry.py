"""Which backend attends, and what is said where FlashInfer can't."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from engine.attention.registry import chosen_backend
from engine.config import EngineConfig
from engine.models.config import ModelConfig, RopeConfig

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


def model(head_dim: int = 128) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        max_position=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e4),
        tie_word_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="bfloat16",
        eos_token_ids=(2,),
    )


def without(*missing: str) -> Callable[[str], bool]:
    return lambda name: name not in missing


def choose(backend: Any, **changes: Any) -> str:
    arguments = {
        "model": model(),
        "dtype": torch.bfloat16,
        "device": GPU,
        "installed": without(),
        **changes,
    }
    return chosen_backend(EngineConfig(model="m", attention_backend=backend), **arguments)


OBSTACLES = [
    ({"device": CPU}, r"needs a GPU, and the device is cpu; set device to cuda"),
    ({"dtype": torch.float32}, r"not torch\.float32; set dtype to bfloat16"),
    ({"model": model(head_dim=80)}, r"no kernels for heads of 80 elements"),
    ({"model": model(head_dim=96)}, r"no kernels for heads of 96 elements"),  # Phi-3-mini
    ({"installed": without("flashinfer")}, r"not installed: flashinfer; .*extra 'gpu'"),
    ({"installed": without("triton")}, r"not installed: triton; "),
    ({"installed": without("triton", "flashinfer")}, r"not installed: flashinfer, triton; "),
]


@pytest.mark.parametrize("backend", ["auto", "flashinfer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gpu_that_can_gets_flashinfer(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    assert choose(backend, dtype=dtype, model=model(head_dim)) == "flashinfer"


def test_torch_native_is_taken_wherever_it_is_asked_for() -> None:
    assert choose("torch_native") == choose("torch_native", device=CPU) == "torch_native"


@pytest.mark.parametrize(("changes", "reason"), OBSTACLES)
def test_flashinfer_by_name_is_refused_with_the_obstacle(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"can't be used: .*{reason}.*set it to auto"):
        choose("flashinfer", **changes)


@pytest.mark.parametrize(("changes", "reason"), OBSTACLES)
def test_auto_falls_back_and_warns_of_what_is_lost_on_a_gpu(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose("auto", **changes) == "torch_native"
    if changes.get("device") == CPU:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert "attention runs in plain torch" in record.getMessage()
        assert re.search(reason, record.getMessage())
