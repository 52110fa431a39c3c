"""READs from one GPU's KV pool into another's, beside a plain copy between the two.

    python -m benchmarks.gpu_kv_transfer [--save]

Two processes, a GPU and a pool of Llama-3.1-8B blocks each. A READ fetches scattered blocks into
scattered blocks, as after hours of traffic: by the GPU's own copies (what `gpu` does on one host)
and by NIXL, whole blocks and the half of the heads that one of two ranks needs; what arrived is
compared. The limit: torch's copy of the same bytes, contiguous, from device to device.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.gpu_limits import elapsed_s
from benchmarks.gpu_shapes import SHAPES
from benchmarks.report import Report, median
from core.kv_layout import KvLayout
from engine.kv.pool import KVPool
from kvtransfer.gpu import GpuTransport
from kvtransfer.head_slices import plan_slices, rank_layout
from kvtransfer.nixl import NixlTransport
from kvtransfer.transport import Read, ReadState, Transport

POOL_BLOCKS = 4096
BLOCK_SIZE = 16
PROMPTS = (512, 4096, 32_768)
MOST_SLICED = 4096
"""Longest prompt whose blocks are read in slices: NIXL takes microseconds for each."""
REPEATS = 10
METADATA = "METADATA "
_DEADLINE_S = 60.0


def llama_layout() -> KvLayout:
    """Blocks with the heads of all ranks."""
    shape = SHAPES["llama-3.1-8b"]
    return KvLayout(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=BLOCK_SIZE,
        dtype="bfloat16",
        block_bytes=BLOCK_SIZE * shape.kv_bytes_per_token,
    )


def llama_pool(device: torch.device, ranks: int = 1) -> KVPool:
    """One rank's pool, in which block i holds the number i everywhere."""
    pool = KVPool(rank_layout(llama_layout(), ranks), POOL_BLOCKS, device)
    numbers = torch.arange(POOL_BLOCKS, dtype=torch.int16, device=device)
    pool.tensor.view(torch.int16).copy_(numbers.view(-1, 1, 1, 1, 1, 1).expand(pool.tensor.shape))
    torch.cuda.synchronize(device)
    return pool


def serve(device: torch.device, *, with_nixl: bool) -> None:
    """Let a pool be read until standard input ends."""
    torch.cuda.set_device(device)
    pool = llama_pool(device)
    nixl = NixlTransport(pool, token=b"") if with_nixl else None
    transport = GpuTransport(pool, token=b"", elsewhere=nixl)
    ways: list[Transport] = [transport] if nixl is None else [transport, nixl]
    print(METADATA + " ".join(way.metadata().hex() for way in ways), flush=True)
    sys.stdin.read()
    transport.close()


def finish(read: Read) -> float:
    """Wait for the end as closely as can be; returns what the copies themselves took."""
    deadline = time.perf_counter() + _DEADLINE_S
    while (state := read.poll()) is ReadState.PENDING:
        if time.perf_counter() > deadline:
            raise RuntimeError("a READ does not end")
        time.sleep(0)
    if state is ReadState.FAILED:
        raise RuntimeError(read.error)
    return read.duration_s


def copy_rate(num_bytes: int) -> list[float]:
    """Bytes per second of plain copies from GPU 1 to GPU 0."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device="cuda:1")
    target = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda:0")
    with torch.cuda.device(0):
        for _ in range(3):
            target.copy_(source)
        return [num_bytes / elapsed_s(lambda: target.copy_(source), "cuda") for _ in range(REPEATS)]


def read_rates(
    transport: Transport, pool: KVPool, counts: Sequence[int]
) -> dict[int, list[tuple[float, float]]]:
    """READs of so many blocks: bytes per second, whole and of the copies alone.

    A first READ of each size does not count.
    """
    order = np.random.default_rng(0)
    rates: dict[int, list[tuple[float, float]]] = {}
    for count in counts:
        for repeat in range(REPEATS + 1):
            theirs = order.permutation(POOL_BLOCKS)[:count].tolist()
            own = order.permutation(pool.num_blocks)[:count].tolist()
            pool.tensor[own].fill_(-1)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            copying_s = finish(transport.read("peer", list(zip(theirs, own, strict=True))))
            whole_s = time.perf_counter() - begun
            num_bytes = count * pool.layout.block_bytes
            if repeat:
                rates.setdefault(count, []).append((num_bytes / whole_s, num_bytes / copying_s))
        found = pool.tensor[own].view(torch.int16)
        wanted = torch.tensor(theirs, dtype=torch.int16, device=found.device)
        assert bool((found == wanted.view(-1, 1, 1, 1, 1, 1)).all()), "wrong bytes arrived"
    return rates


def add_ways(
    report: Report, limits: dict[int, float], metadata: Sequence[bytes], ranks: int
) -> None:
    """Measure both transports with the pool of one of so many ranks."""
    pool = llama_pool(torch.device("cuda:0"), ranks)
    (part,) = plan_slices(
        llama_layout(), llama_layout(), source_size=1, own_size=ranks, own_rank=ranks - 1
    )
    what = "whole blocks" if ranks == 1 else f"heads of one of {ranks} ranks"
    counts = [tokens // BLOCK_SIZE for tokens in PROMPTS if ranks == 1 or tokens <= MOST_SLICED]
    ways: dict[str, Transport] = {
        "gpu": GpuTransport(pool, token=b"", elsewhere=None),
        "nixl": NixlTransport(pool, token=b""),
    }
    for (name, transport), theirs in zip(ways.items(), metadata, strict=True):
        transport.connect("peer", theirs, part.pieces)
        try:
            for count, rates in read_rates(transport, pool, counts).items():
                tokens = count * BLOCK_SIZE
                title = f"{name}: READ of {tokens} tokens, {what}"
                whole, copying = (
                    [rate / 1e9 for rate in each] for each in zip(*rates, strict=True)
                )
                report.add(title, median(whole), "GB/s", samples=whole)
                goal = ">= 0.85" if (name, tokens, ranks) == ("gpu", 4096, 1) else ""
                share = median(whole) * 1e9 / limits[tokens]
                report.add(f"{title}, share of the limit", share, "x", goal=goal)
                report.add(f"{title}, the copies alone", median(copying), "GB/s", samples=copying)
        finally:
            transport.close()


def main() -> None:
    """Measure, print, perhaps save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--save", action="store_true", help="keep a JSON file in results/")
    parser.add_argument("--serve", metavar="DEVICE", help=argparse.SUPPRESS)
    parser.add_argument(
        "--nixl", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.serve:
        serve(torch.device(arguments.serve), with_nixl=arguments.nixl)
        return
    gpu = {"name": torch.cuda.get_device_name(0)}
    settings = {"pool_blocks": POOL_BLOCKS, "repeats": REPEATS}
    report = Report("gpu-kv-transfer", settings, gpu=gpu)
    limits = {}
    for tokens in PROMPTS:
        rates = copy_rate(tokens * SHAPES["llama-3.1-8b"].kv_bytes_per_token)
        limits[tokens] = median(rates)
        name = f"limit: plain copy of {tokens} tokens"
        report.add(name, limits[tokens] / 1e9, "GB/s", samples=[rate / 1e9 for rate in rates])
    command = [sys.executable, "-m", "benchmarks.gpu_kv_transfer", "--serve", "cuda:1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        line = next((line for line in child.stdout if line.startswith(METADATA)), "")
        metadata = [bytes.fromhex(part) for part in line.removeprefix(METADATA).split()]
        for ranks in (1, 2):
            add_ways(report, limits, metadata, ranks)
        child.communicate(timeout=_DEADLINE_S)
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
