"""Weights under one set of names, whichever way a checkpoint stores them.

Models ask for each projection by Llama's name, and for `mlp.gate` and
`mlp.experts.{n}.{gate,up,down}_proj`, as Qwen3's checkpoints have them. Phi-3's have q, k and v as
one matrix, and gate and up as one; Mixtral's say `block_sparse_moe` and `w1`, `w3`, `w2`;
transformers 5 may stack all experts of a layer, for either. Source: transformers' modeling_phi3.py
and conversion_mapping.py (Apache-2.0), for the names and the order of rows.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from core.errors import ConfigError

_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MIXTRAL = re.compile(r"(.+)\.block_sparse_moe\.(?:gate|experts\.(\d+)\.(w[123]))\.weight")
_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_FUSED = re.compile(r"(.+)\.(qkv|gate_up)_proj\.weight")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a weight lies: a tensor of the checkpoint, or a part of one."""

    name: str
    """Of the tensor."""
    expert: int | None = None
    """Of those stacked in it."""
    rows: slice | None = None
    """Of the matrix; None: all."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight, a view of the tensor."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix if self.rows is None else matrix[self.rows]


def stored_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Name that models ask for -> where it lies, of every tensor of a checkpoint.

    Args:
        shapes: by the tensors' names.

    Raises:
        ConfigError: two tensors hold the same weight.
    """
    found: dict[str, Stored] = {}
    for tensor in shapes:
        for name, stored in _weights(tensor, shapes):
            if name in found:
                raise ConfigError(
                    f"The checkpoint holds {name} twice, in {found[name].name} and in {tensor}."
                )
            found[name] = stored
    return found


def _weights(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Stored]]:
    shape = shapes[tensor]
    if found := _MIXTRAL.fullmatch(tensor):
        prefix, expert, part = found.groups()
        own = "gate" if part is None else f"experts.{expert}.{_MIXTRAL_PARTS[part]}"
        yield f"{prefix}.mlp.{own}.weight", Stored(tensor)
    elif found := _STACKED.fullmatch(tensor):
        prefix, kind = found.groups()
        parts = _halves(shape[1]) if kind == "gate_up_proj" else {"down": slice(None)}
        for expert in range(shape[0]):
            for part, rows in parts.items():
                yield f"{prefix}.{expert}.{part}_proj.weight", Stored(tensor, expert, rows)
    elif (found := _FUSED.fullmatch(tensor)) and (parts := _fused(found[1], found[2], shapes)):
        for part, rows in parts.items():
            yield f"{found[1]}.{part}_proj.weight", Stored(tensor, rows=rows)
    else:
        yield tensor, Stored(tensor)


def _fused(prefix: str, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, slice]:
    """Rows of each projection in `prefix`.`kind`_proj; empty if they can't be told."""
    rows = shapes[f"{prefix}.{kind}_proj.weight"][0]
    if kind == "gate_up":
        return _halves(rows)
    # How many are q's, the matrix after attention tells: they are its columns.
    output = shapes.get(f"{prefix}.o_proj.weight", ())
    if len(output) != 2:
        return {}
    query = output[1]
    value = query + (rows - query) // 2
    return {"q": slice(query), "k": slice(query, value), "v": slice(value, rows)}


def _halves(rows: int) -> dict[str, slice]:
    return {"gate": slice(rows // 2), "up": slice(rows // 2, rows)}
