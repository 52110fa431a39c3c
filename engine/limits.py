"""How large steps may be: what the user set, or what suits the device. Pure.

The scheduler plans within these limits; the GPU runner reserves its memory and captures its graphs
for them, and a worker tells routers of them.
"""

from dataclasses import dataclass

from core.errors import ConfigError
from engine.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The largest step."""

    max_num_seqs: int
    """Sequences."""
    max_step_tokens: int
    """Tokens, decodes and prompt chunks together."""
    max_chunk_tokens: int
    """Prompt tokens of one request."""


_DEVICE_DEFAULTS = {False: (64, 512), True: (256, 8192)}
"""(max_num_seqs, max_step_tokens) by whether the device is a GPU.

A CPU spends about a second on 512 tokens of the demo model, as long as decodes should ever wait. A
GPU needs thousands of tokens in its matrix products before arithmetic, and not reading weights, is
what it spends a prompt's time on.
"""


def engine_limits(config: EngineConfig, *, gpu: bool) -> EngineLimits:
    """What the settings come to on a GPU, or on a CPU.

    Raises:
        ConfigError: a limit is below 1.
    """
    default_seqs, default_tokens = _DEVICE_DEFAULTS[gpu]
    tokens = _at_least_one("max_step_tokens", config.max_step_tokens, default_tokens)
    return EngineLimits(
        max_num_seqs=_at_least_one("max_num_seqs", config.max_num_seqs, default_seqs),
        max_step_tokens=tokens,
        max_chunk_tokens=_at_least_one("max_chunk_tokens", config.max_chunk_tokens, tokens),
    )


def _at_least_one(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}; leave it unset for {default}.")
    return value


def watermark_blocks(num_blocks: int) -> int:
    """How many blocks of a pool admission leaves for running sequences to grow into.

    Source: one in a hundred is the default of vLLM's scheduler (Apache-2.0).
    """
    return max(1, num_blocks // 100)
