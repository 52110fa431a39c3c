"""Which builds of our kernels steps of all kinds would need on a GPU; run with `python -m`.

Nothing is launched: what tells one build from another is the kinds of a kernel's arguments, and
those follow from shapes. In a process of its own, for triton chooses between compiler and
interpreter when it is imported.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from engine.cuda.kernels.experts import gather
from engine.cuda.kernels.few_rows import few_rows
from engine.cuda.kernels.product import Product
from engine.cuda.kernels.tokens import resolve_tokens
from engine.cuda.sampling import Sampler, draw_plain, plain_arrays
from engine.cuda.sampling_copies import send
from engine.plan import SampleSpec
from tests.support.sampling import AllowedIds, make_spec

VOCAB = 3000
CPU = torch.device("cpu")
Build = tuple[str, str]


@contextmanager
def recorded(builds: set[Build]) -> Iterator[None]:
    """Note what each launch would need, and don't launch."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[Any, Any] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, backend
            )
        _, kinds, rest = binders[kernel](*args, **options)
        builds.add((kernel.fn.__name__, f"{kinds} {sorted(rest.items())}"))

    launch, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = launch


def kinds_of_specs() -> list[SampleSpec]:
    """One of each kind that is drawn by kernels of its own."""
    return [
        make_spec(),
        make_spec(temperature=0.0),
        make_spec(top_p=0.9),
        make_spec(top_k=3),
        make_spec(min_p=0.1),
        make_spec(logit_bias={3: 1.5}),
        make_spec(banned=(0, 39)),
        make_spec(presence_penalty=0.7, top_p=0.5, output=(5, 5, 6)),
        make_spec(mask=AllowedIds(VOCAB, 0, 31)),
        make_spec(mask=AllowedIds(VOCAB, 0, 31), top_k=2),
    ]


def draw(sampler: Sampler, specs: list[SampleSpec]) -> None:
    """As a step does."""
    logits = torch.zeros(len(specs), VOCAB, dtype=torch.bfloat16)
    out = torch.zeros(64, dtype=torch.int32)[: len(specs)]
    draw_plain(logits, *send(plain_arrays(specs), CPU), out)
    sampler.draw(logits, specs, out)


def new_for_sampling() -> set[Build]:
    """What traffic of random mixtures needs and a rehearsal has not built."""
    rehearsed: set[Build] = set()
    with recorded(rehearsed):
        sampler = Sampler()
        draw(sampler, [make_spec()])
        sampler.rehearse(torch.zeros(3, VOCAB, dtype=torch.bfloat16))
    assert {name for name, _ in rehearsed} >= {"_pick", "_floor", "_sum_above", "_forbid"}
    needed: set[Build] = set()
    rng = random.Random(5)
    with recorded(needed):
        for _ in range(150):
            draw(sampler, rng.choices(kinds_of_specs(), k=rng.randint(1, 40)))
    return needed - rehearsed


def new_for_products() -> set[Build]:
    """What other numbers of rows need than those that graphs and rehearsals have."""
    weight = torch.zeros(256, 512, dtype=torch.bfloat16)
    product = Product(weight=weight, bias=None, gated=False)

    def products(counts: Iterator[int]) -> set[Build]:
        builds: set[Build] = set()
        with recorded(builds):
            for rows in counts:
                few_rows(product, weight.new_zeros(rows, 512), weight.new_zeros(rows, 256))
                resolve_tokens(*(torch.zeros(128, dtype=torch.int32)[:rows] for _ in range(3)))
                gather(torch.zeros(rows, 2, dtype=torch.int32), first=0, count=4, total=4)
        return builds

    return products(iter(range(2, 129))) - products(iter((2, 4, 8, *range(16, 129, 16))))


if __name__ == "__main__":
    missing = sorted(new_for_sampling() | new_for_products())
    sys.exit("\n".join(map(" ".join, missing)) or 0)
