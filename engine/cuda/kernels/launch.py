"""How kernels here are launched: overlapping with the kernel before them where the GPU can.

Programmatic dependent launch (CUDA C++ programming guide, 3.2.8.1): a kernel launched with
`launch_pdl` may start while the one before it still runs; `gdc_wait` then waits for that one's end,
and `gdc_launch_dependents` lets the next one start. So launch and prologue cost nothing. A kernel
must not touch anything that an earlier kernel writes, nor write anything, before its `gdc_wait`.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as cuda_language

from engine.cuda.support import has_dependent_launch


def built_once(*varying: str) -> Callable[[Any], Any]:
    """`triton.jit` for a kernel of which some arguments differ from step to step.

    Triton builds a kernel anew for integers that are 1 or multiples of 16, and for addresses that
    are: half a second in which no sequence goes on. What is named here has no part in that.
    """
    decorator: Callable[[Any], Any] = triton.jit(do_not_specialize=varying)
    return decorator


def overlap(tensor: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch on the tensor's device."""
    if has_dependent_launch(tensor.device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait for what earlier ones write.

    In this order, so that a product of matrices two kernels on can begin to fetch its weights.
    """
    if OVERLAP:
        cuda_language.gdc_launch_dependents()
        cuda_language.gdc_wait()


@triton.jit
def fetch_to_l2(pointers):
    """Start to bring the 128-byte lines at these addresses into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.uint64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
