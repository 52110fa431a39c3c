import pytest

from core.errors import ConfigError
from engine.config import EngineConfig
from engine.limits import engine_limits


@pytest.mark.parametrize(("gpu", "seqs", "tokens"), [(False, 64, 512), (True, 256, 8192)])
def test_steps_suit_the_device_unless_said_otherwise(gpu: bool, seqs: int, tokens: int) -> None:
    limits = engine_limits(EngineConfig(model="m"), gpu=gpu)
    assert (limits.max_num_seqs, limits.max_step_tokens, limits.max_chunk_tokens) == (
        seqs,
        tokens,
        tokens,
    )
    chosen = EngineConfig(model="m", max_num_seqs=3, max_step_tokens=40)
    limits = engine_limits(chosen, gpu=gpu)
    assert (limits.max_num_seqs, limits.max_step_tokens, limits.max_chunk_tokens) == (3, 40, 40)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_step_tokens", "max_chunk_tokens"])
def test_limit_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
        engine_limits(EngineConfig(model="m", **{name: 0}), gpu=True)  # type: ignore[arg-type]
