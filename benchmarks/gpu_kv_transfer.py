"""NIXL READs from one GPU's KV pool into another's, beside a plain copy between the two.

    python -m benchmarks.gpu_kv_transfer [--save]

Two processes, a GPU and a pool of Llama-3.1-8B blocks each. A READ fetches scattered blocks into
scattered blocks, as after hours of traffic, with descriptors of several sizes; what arrived is
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
from kvtransfer.nixl import NixlTransport
from kvtransfer.transport import Read, ReadState

POOL_BLOCKS = 4096
BLOCK_SIZE = 16
PROMPTS = (512, 4096, 32_768)
DESCRIPTORS = (2 << 20, 512 << 10, 64 << 10)
REPEATS = 10
_METADATA = "METADATA "
_DEADLINE_S = 60.0


def llama_pool(device: torch.device, num_blocks: int = POOL_BLOCKS) -> KVPool:
    """A pool in which block i holds the number i everywhere."""
    shape = SHAPES["llama-3.1-8b"]
    layout = KvLayout(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=BLOCK_SIZE,
        dtype="bfloat16",
        block_bytes=BLOCK_SIZE * shape.kv_bytes_per_token,
    )
    pool = KVPool(layout, num_blocks, device)
    numbers = torch.arange(num_blocks, dtype=torch.int16, device=device)
    pool.tensor.view(torch.int16).copy_(numbers.view(-1, 1, 1, 1, 1, 1).expand(pool.tensor.shape))
    return pool


def serve(device: torch.device) -> None:
    """Let a pool be read until standard input ends."""
    transport = NixlTransport(llama_pool(device), token=b"")
    print(_METADATA + transport.metadata().hex(), flush=True)
    sys.stdin.read()
    transport.close()


def finish(read: Read) -> float:
    """Wait for the end as closely as can be; returns what the READ itself took."""
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
    metadata: bytes, pool: KVPool, descriptor_bytes: int, counts: Sequence[int]
) -> dict[int, list[float]]:
    """Bytes per second of READs of so many blocks; a first READ of each size does not count."""
    transport = NixlTransport(pool, token=b"", descriptor_bytes=descriptor_bytes)
    transport.connect("peer", metadata)
    order = np.random.default_rng(descriptor_bytes)
    rates: dict[int, list[float]] = {}
    try:
        for count in counts:
            for repeat in range(REPEATS + 1):
                theirs = order.permutation(POOL_BLOCKS)[:count].tolist()
                own = order.permutation(pool.num_blocks)[:count].tolist()
                pool.tensor[own[-1]].zero_()
                torch.cuda.synchronize()
                begun = time.perf_counter()
                finish(transport.read("peer", list(zip(theirs, own, strict=True))))
                seconds = time.perf_counter() - begun
                if repeat:
                    rates.setdefault(count, []).append(count * pool.layout.block_bytes / seconds)
            found = pool.tensor[own].view(torch.int16)
            wanted = torch.tensor(theirs, dtype=torch.int16, device=found.device)
            assert bool((found == wanted.view(-1, 1, 1, 1, 1, 1)).all()), "wrong bytes arrived"
    finally:
        transport.close()
    return rates


def main() -> None:
    """Measure, print, perhaps save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--save", action="store_true", help="keep a JSON file in results/")
    parser.add_argument("--serve", metavar="DEVICE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(torch.device(arguments.serve))
        return
    counts = [tokens // BLOCK_SIZE for tokens in PROMPTS]
    gpu = {"name": torch.cuda.get_device_name(0)}
    settings = {"pool_blocks": POOL_BLOCKS, "repeats": REPEATS}
    report = Report("gpu-kv-transfer", settings, gpu=gpu)
    block_bytes = BLOCK_SIZE * SHAPES["llama-3.1-8b"].kv_bytes_per_token
    limits = {}
    for tokens, count in zip(PROMPTS, counts, strict=True):
        rates = copy_rate(count * block_bytes)
        limits[tokens] = median(rates)
        name = f"limit: plain copy of {tokens} tokens"
        report.add(name, limits[tokens] / 1e9, "GB/s", samples=[rate / 1e9 for rate in rates])
    pool = llama_pool(torch.device("cuda:0"))
    command = [sys.executable, "-m", "benchmarks.gpu_kv_transfer", "--serve", "cuda:1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        line = next((line for line in child.stdout if line.startswith(_METADATA)), "")
        metadata = bytes.fromhex(line.removeprefix(_METADATA))
        for size in DESCRIPTORS:
            for count, rates in read_rates(metadata, pool, size, counts).items():
                tokens = count * BLOCK_SIZE
                title = f"READ of {tokens} tokens in {size >> 10} KiB pieces"
                report.add(
                    title, median(rates) / 1e9, "GB/s", samples=[rate / 1e9 for rate in rates]
                )
                goal = ">= 0.85" if tokens == 4096 else ""
                share = median(rates) / limits[tokens]
                report.add(f"{title}, share of the limit", share, "x", goal=goal)
        child.communicate(timeout=_DEADLINE_S)
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
