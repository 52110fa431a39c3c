"""What each rank has of a model, and which numbers of ranks are refused."""

from typing import Any

import pytest

from core.errors import ConfigError
from engine.models.config import ModelConfig, parse_model_config
from engine.parallel.shares import ExpertShare, expert_share, rank_share, told_of_experts


def model(**changes: Any) -> ModelConfig:
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 96,
        "intermediate_size": 100,
        "moe_intermediate_size": 36,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 64,
    }
    return parse_model_config({**raw, **changes}, ())


@pytest.mark.parametrize("rank", range(4))
def test_experts_are_shared_out_whole_where_ranks_divide_their_number(rank: int) -> None:
    experts = model().experts
    assert experts is not None
    share = expert_share(experts, rank, 4)
    assert share == ExpertShare(first=2 * rank, count=2, intermediate_size=36, whole=True)
    assert "2 of a layer's 8 experts" in told_of_experts(model(), 4)


def test_experts_are_cut_where_ranks_do_not_divide_their_number() -> None:
    experts = model().experts
    assert experts is not None
    share = expert_share(experts, 2, 3)
    assert share == ExpertShare(first=0, count=8, intermediate_size=12, whole=False)
    assert "a part of every one" in told_of_experts(model(), 3)


def test_dense_rows_matter_only_where_a_layer_is_dense() -> None:
    assert rank_share(model(), 3).num_heads == 4
    with pytest.raises(ConfigError, match=r"100 feed-forward rows; it can be 1, 2, 4\."):
        rank_share(model(mlp_only_layers=[0]), 3)


def test_ranks_that_can_neither_share_nor_cut_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="35 feed-forward rows of each of 8 experts"):
        rank_share(model(moe_intermediate_size=35), 3)
    assert rank_share(model(moe_intermediate_size=35), 4).num_heads == 3
