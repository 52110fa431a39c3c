"""Builds kernels for GPUs that are not there, down to machine code; run with `python -m`.

The interpreter accepts more than the compiler does, and what is compiled here is not run. In a
process of its own, for triton chooses between the two when it is imported.
"""

import sys
from typing import Any

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.cuda.kernels import experts

_ALIGNED = [["tt.divisibility", 16]]
_PAIRS = {"order": "*i32", "bounds": "*i32"}


def build_expert_kernels(capability: int) -> None:
    """Of Qwen3-30B-A3B in bfloat16, for few tokens per expert and for many."""
    overlap = {"OVERLAP": capability >= 90}
    _build(
        experts._choose,
        {"logits": "*bf16", "weights": "*bf16", "chosen": "*i32"},
        {"COUNT": 128, "BLOCK": 128, "PER_TOKEN": 8, "SLOTS": 8, "NORMALISED": True, **overlap},
        capability,
    )
    counts = {"pairs": "i32", "first": "i32", "count": "i32"}
    _build(
        experts._gather,
        {"chosen": "*i32", **_PAIRS, **counts},
        {"CHUNK": 1024, **overlap},
        capability,
    )
    shape = {"COUNT": 128, "EXPERTS": 128, "SIZE": 2048, "COLUMNS": 768, "GATED": True}
    for block_m, block_n, block_k in ((16, 32, 128), (64, 64, 64)):
        tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        _build(
            experts._expert_products,
            {"x": "*bf16", "weight": "*bf16", **_PAIRS, "out": "*bf16", "per_row": "i32"},
            {**shape, **tile, **overlap},
            capability,
        )


def _build(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int
) -> None:
    pointers = [(i,) for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs=dict.fromkeys(pointers, _ALIGNED),
    )
    options = {"num_warps": 4, "num_stages": 3, "launch_pdl": constants["OVERLAP"]}
    built = build(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.asm["cubin"]
    # Some GPUs give no more than this to one program.
    assert built.metadata.shared <= 99 << 10, "too much shared memory"


if __name__ == "__main__":
    for each in sys.argv[1:]:
        build_expert_kernels(int(each))
