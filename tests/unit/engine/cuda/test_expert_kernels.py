"""Layers with experts by kernels against the same in torch; without a GPU, in the interpreter."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from engine.layers.experts import ExpertMLP
from engine.loader.source import WeightSource
from engine.models.config import ExpertsConfig
from engine.parallel.group import Alone

pytest.importorskip("triton")
from engine.cuda.kernels.experts import choose, gather

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, INNER = 72, 40
"""Neither fills whole tiles."""


class OneOf(Alone):
    """A rank whose sums are never completed."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size  # type: ignore[misc]


def layer(group: Alone, experts: ExpertsConfig, dtype: torch.dtype) -> ExpertMLP:
    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    source = WeightSource(None, read, group, dtype=dtype, device=DEVICE)
    return ExpertMLP(source, "mlp", HIDDEN, experts, group)


@pytest.mark.parametrize(
    ("tokens", "count", "per_token", "group", "dtype"),
    [
        (1, 6, 3, Alone(), torch.float32),  # most experts have no token
        (5, 4, 1, Alone(), torch.float16),
        (150, 3, 2, Alone(), torch.float16),  # several tiles for each
        (9, 6, 3, OneOf(1, 2), torch.float16),  # three whole experts
        (9, 3, 2, OneOf(1, 2), torch.float32),  # half of each of three
    ],
)
def test_kernels_compute_what_torch_does(
    tokens: int, count: int, per_token: int, group: Alone, dtype: torch.dtype
) -> None:
    experts = ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=INNER,
        normalised=tokens % 2 == 1,
        layers=frozenset([0]),
    )
    mlp = layer(group, experts, dtype)
    x = torch.randn(tokens, HIDDEN, device=DEVICE).to(dtype)
    mlp._fused = False
    expected = mlp(x)
    mlp._fused = True
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(mlp(x), expected, atol=tolerance, rtol=tolerance)
    assert expected.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_values_that_are_no_numbers_choose_experts_that_exist() -> None:
    logits = torch.full((2, 5), float("nan"), device=DEVICE)
    _, chosen = choose(logits, 3, normalised=True)
    assert chosen.min() >= 0 and chosen.max() < 5


def test_more_pairs_than_one_chunk_are_all_gathered() -> None:
    chosen = torch.randint(0, 7, (900, 3), device=DEVICE, dtype=torch.int32)
    gathered = gather(chosen, first=2, count=4, total=7)
    bounds = gathered.bounds.tolist()
    flat = chosen.flatten()
    for index in range(4):
        own = gathered.order[bounds[index] : bounds[index + 1]].long().cpu()
        assert own.tolist() == (flat == index + 2).nonzero()[:, 0].tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="triton has compilers for Linux alone")
def test_kernels_are_built_for_gpus_before_and_since_overlapping_launches(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.kernel_builds", "80", "90"]
    subprocess.run(command, check=True, timeout=120, env=env)
