"""Weights of experts under one set of names, whichever way a checkpoint stores them.

Models ask for `mlp.gate` and `mlp.experts.{n}.{gate,up,down}_proj`, as Qwen3's checkpoints have
them. Mixtral's say `block_sparse_moe` and `w1`, `w3`, `w2`; transformers 5 may stack all experts of
a layer, for either. Source: transformers' conversion_mapping.py (Apache-2.0), for the names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MIXTRAL = re.compile(r"(.+)\.block_sparse_moe\.(?:gate|experts\.(\d+)\.(w[123]))\.weight")
_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a weight lies: a tensor of the checkpoint, or a part of one."""

    name: str
    """Of the tensor."""
    expert: int | None = None
    """Of those stacked in it."""
    half: int | None = None
    """Of the expert's rows; gate comes before up."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight, a view of the tensor."""
        if self.expert is None:
            return tensor
        matrix = tensor[self.expert]
        return matrix if self.half is None else matrix.chunk(2)[self.half]


def stored_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Name that models ask for -> where it lies, of every tensor of a checkpoint.

    Args:
        shapes: by the tensors' names.
    """
    return {name: stored for tensor in shapes for name, stored in _weights(tensor, shapes[tensor])}


def _weights(tensor: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Stored]]:
    if found := _MIXTRAL.fullmatch(tensor):
        prefix, expert, part = found.groups()
        own = "gate" if part is None else f"experts.{expert}.{_MIXTRAL_PARTS[part]}"
        yield f"{prefix}.mlp.{own}.weight", Stored(tensor)
    elif found := _STACKED.fullmatch(tensor):
        prefix, kind = found.groups()
        halves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ()
        for expert in range(shape[0]):
            for half, part in enumerate(halves):
                yield f"{prefix}.{expert}.{part}.weight", Stored(tensor, expert, half)
            if not halves:
                yield f"{prefix}.{expert}.down_proj.weight", Stored(tensor, expert)
    else:
        yield tensor, Stored(tensor)
