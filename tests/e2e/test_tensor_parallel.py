"""Workers whose model lies on several ranks, in the whole system."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.support.cluster import Cluster, Worker, cluster
from tests.support.models import make_checkpoint
from tests.support.oracle import Oracle
from tests.support.process import alive, command_line, descendants, wait_until

PROMPT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
MAX_TOKENS = 24
STEP = {"max_step_tokens": 64}
QUICK = {"worker_silence_s": "2s", "no_worker_grace_s": "2s"}
LONG = 24
"""Repetitions of the prompt whose computing takes long enough to be interrupted."""


def expected(model: Path, prompt: str) -> list[int]:
    oracle = Oracle(model)
    return oracle.greedy(oracle.tokenizer(prompt)["input_ids"], MAX_TOKENS, ignore_eos=True)


def answer(system: Cluster, prompt: str) -> tuple[str, list[int]]:
    """How a request was served, and its tokens."""
    with system.openai() as client:
        response = client.completions.with_raw_response.create(
            model=client.models.list().data[0].id,
            prompt=prompt,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
    ids = list(response.parse().choices[0].token_ids)  # type: ignore[attr-defined]
    return response.headers["x-diptych-mode"], ids


class Answering(threading.Thread):
    """A request in the background."""

    def __init__(self, system: Cluster, prompt: str, answers: list[tuple[str, list[int]]]) -> None:
        super().__init__(daemon=True)
        self._arguments = (system, prompt)
        self._answers = answers

    def run(self) -> None:
        self._answers.append(answer(*self._arguments))


def tensor_parallel(*sizes: int) -> list[dict[str, object]]:
    return [{"tensor_parallel_size": size} for size in sizes]


@contextmanager
def alone(system: Cluster, *chosen: Worker) -> Iterator[None]:
    """All other workers take no requests meanwhile."""
    others = [worker for worker in system.workers if worker not in chosen]
    for worker in others:
        worker.drain()
    wait_attached(system, 1, 1)
    yield
    for worker in others:
        worker.drain(resume=True)
    wait_attached(system, len(system.prefill), len(system.decode))


def wait_attached(system: Cluster, *numbers: int) -> None:
    wait_until(
        lambda: tuple(system.num_attached(role) for role in ("prefill", "decode")) == numbers,
        10,
        f"the router to have {numbers} workers",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "num_kv_heads", "transport", "prefill", "decode"),
    [
        ("LlamaForCausalLM", 4, "nixl", (1, 2), (1, 2)),
        ("MixtralForCausalLM", 2, "tcp", (1,), (4,)),  # an expert on each rank of decode
    ],
)
def test_kv_moves_between_workers_of_any_number_of_ranks(
    tmp_path: Path,
    arch: str,
    num_kv_heads: int,
    transport: str,
    prefill: tuple[int, ...],
    decode: tuple[int, ...],
) -> None:
    model = make_checkpoint(tmp_path, arch, num_key_value_heads=num_kv_heads)
    with cluster(
        model,
        transport=transport,
        worker=STEP,
        prefill_worker=tensor_parallel(*prefill),
        decode_worker=tensor_parallel(*decode),
    ) as system:
        for worker in system.workers:
            description = worker.describe().worker
            assert description.layout.num_kv_heads == num_kv_heads, "of all ranks"
            assert description.kv_address and list(description.transports) == [transport]
        pairs = list(product(system.prefill, system.decode))
        for number, pair in enumerate(pairs[-3:]):  # all but the one without ranks
            prompt = f"{number}. {PROMPT * 2}"
            with alone(system, *pair):
                assert answer(system, prompt) == ("disaggregated", expected(model, prompt))
        system.wait_balanced()


@pytest.mark.gpu
@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1)])
def test_kv_moves_between_gpus_of_workers_of_unequal_ranks(
    tmp_path: Path, prefill: int, decode: int
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = make_checkpoint(tmp_path)
    with cluster(
        model,
        # Exact arithmetic, so that tokens are those of the oracle however heads are shared.
        worker={**STEP, "device": "cuda:0", "dtype": "float32"},
        prefill_worker=tensor_parallel(prefill),
        decode_worker=tensor_parallel(decode),
    ) as system:
        assert answer(system, PROMPT * 2) == ("disaggregated", expected(model, PROMPT * 2))
        system.wait_balanced()


@pytest.mark.slow
def test_a_lost_rank_on_either_side_of_a_transfer_costs_no_token(slow_llama: Path) -> None:
    with cluster(
        slow_llama,
        worker={**STEP, "tensor_parallel_size": 2},
        prefill_worker={"lease_ttl_s": "4s"},
        router=QUICK,
    ) as system:
        (prefill,), (decode,) = system.prefill, system.decode
        for victim, mode in ((decode, "prefill_only"), (prefill, "decode_only")):
            prompt = f"{mode}. {PROMPT * LONG}"
            answers: list[tuple[str, list[int]]] = []
            request = Answering(system, prompt, answers)
            request.start()
            wait_until(lambda: _transferring(prefill, decode), 30, "KV to be on its way")
            process = victim.process
            assert process is not None
            below = descendants(process.pid)
            (rank,) = [pid for pid in below if "worker.rank" in command_line(pid)]
            os.kill(rank, signal.SIGKILL)
            request.join(60)
            assert [ids for _, ids in answers] == [expected(slow_llama, prompt)]
            assert process.wait(20) != 0
            assert "was ended by signal SIGKILL" in process.log
            assert not any(alive(pid) for pid in below)
            victim.kill()
            system.wait_balanced()
            assert answer(system, "Hello")[0] == mode
            if victim is decode:
                victim.start()
                system.wait_ready()


def _transferring(prefill: Worker, decode: Worker) -> bool:
    """Decode has reserved blocks and prefill is not done yet."""
    computing, reading = prefill.describe().load, decode.describe().load
    return bool(reading.leases and reading.held_blocks and computing.backlog_tokens)
