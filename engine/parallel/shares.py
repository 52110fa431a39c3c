"""One rank's share of the model and the devices; refuses what can't be shared."""

from dataclasses import dataclass, replace

import torch

from core.errors import ConfigError
from engine.config import EngineConfig
from engine.models.config import ExpertsConfig, ModelConfig

_MAX_SIZE = 64
"""Largest size that an error message proposes."""


def rank_share(config: ModelConfig, size: int) -> ModelConfig:
    """The model as one of `size` ranks computes it: its heads and its part of the feed-forward.

    If there are fewer KV heads than ranks, several ranks compute and hold the same one. The
    vocabulary stays whole: logits are gathered before anyone looks at them.

    Raises:
        ConfigError: heads or feed-forward can't be divided by so many.
    """
    if size == 1:
        return config
    uneven = _uneven(config, size)
    if uneven:
        good = [n for n in range(1, _MAX_SIZE + 1) if not _uneven(config, n)]
        raise ConfigError(
            f"tensor_parallel_size is {size}, which does not divide the model's "
            f"{' and '.join(uneven)}; it can be {', '.join(map(str, good))}."
        )
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, config.num_kv_heads // size),
        intermediate_size=config.intermediate_size // size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShare:
    """What one rank has of the experts of each layer."""

    first: int
    count: int
    intermediate_size: int
    """Of its part of each."""
    whole: bool
    """Each expert is on one rank; else each is cut, as a dense layer is."""


def expert_share(experts: ExpertsConfig, rank: int, size: int) -> ExpertShare:
    """Whole experts if the ranks divide their number, so that matrices stay large; else parts."""
    if experts.count % size == 0:
        count = experts.count // size
        return ExpertShare(
            first=rank * count,
            count=count,
            intermediate_size=experts.intermediate_size,
            whole=True,
        )
    return ExpertShare(
        first=0,
        count=experts.count,
        intermediate_size=experts.intermediate_size // size,
        whole=False,
    )


def told_of_experts(config: ModelConfig, size: int) -> str:
    """How `size` ranks share them, for the log; empty if there is nothing to tell."""
    experts = config.experts
    if experts is None or size == 1:
        return ""
    share = expert_share(experts, 0, size)
    if share.whole:
        return f"each rank has {share.count} of a layer's {experts.count} experts"
    return f"each rank has a part of every one of a layer's {experts.count} experts"


def _uneven(config: ModelConfig, size: int) -> list[str]:
    """What of the model `size` ranks can't share."""
    counts = {"attention heads": config.num_heads}
    if config.has_dense_layers:
        counts["feed-forward rows"] = config.intermediate_size
    experts = config.experts
    if experts is not None and experts.count % size:
        counts[f"feed-forward rows of each of {experts.count} experts"] = experts.intermediate_size
    if size % config.num_kv_heads:
        counts["KV heads"] = config.num_kv_heads
    return [f"{count} {name}" for name, count in counts.items() if count % size]


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: the configured one for the first of its host, then those after it.

    Raises:
        ConfigError: there are too few.
    """
    device = torch.device(config.device)
    size = config.tensor_parallel_size
    if device.type == "cpu":
        return device
    if size == 1:
        return torch.device(device.type, device.index or 0)
    if device.type != "cuda":
        raise ConfigError(f"tensor_parallel_size above 1 needs device cpu or cuda, not {device}.")
    here = config.ranks_per_node
    first, found = device.index or 0, torch.cuda.device_count()
    if first + here > found:
        raise ConfigError(
            f"{here} ranks from cuda:{first} on need {first + here} GPUs and {found} are visible; "
            "lower tensor_parallel_size, spread it over more nodes, or show the process more GPUs."
        )
    return torch.device("cuda", first + rank % here)
