"""What config.json leaves out is what transformers takes for it, and windows bound sequences."""

from typing import Any

import pytest
from transformers import AutoConfig

from engine.models.config import parse_model_config
from tests.support.models import EXPERTS, MODEL_TYPES

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32 * 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 1 << 20,
}


@pytest.mark.parametrize("arch", MODEL_TYPES)
def test_absent_keys_mean_what_they_mean_to_transformers(arch: str) -> None:
    given = {**SHAPE, **EXPERTS.get(arch, {})}
    ours = parse_model_config({**given, "architectures": [arch]}, ())
    theirs: Any = AutoConfig.for_model(MODEL_TYPES[arch], **given)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    ("window", "bounds"), [(None, False), (4096, True), (32768, False), (1 << 20, False)]
)
@pytest.mark.parametrize("arch", ["MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"])
def test_a_window_bounds_sequences_where_positions_reach_beyond_it(
    arch: str, window: int | None, bounds: bool
) -> None:
    raw = {**SHAPE, **EXPERTS.get(arch, {}), "architectures": [arch], "sliding_window": window}
    found = parse_model_config({**raw, "max_position_embeddings": 32768}, ())
    assert found.max_position == (window if bounds else 32768)
    assert ("sliding_window" in found.length_bound) == bounds


def test_a_window_that_is_switched_off_does_not_count() -> None:
    raw = {**SHAPE, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}
    assert parse_model_config({**raw, "use_sliding_window": False}, ()).max_position == 1 << 20
