"""Workers whose model lies on two ranks, in the whole system."""

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, Worker, cluster
from tests.support.oracle import Oracle
from tests.support.process import alive, command_line, descendants, wait_until

PROMPT = "The quick brown fox jumps over"
MAX_TOKENS = 400


def ids_of(system: Cluster) -> list[int]:
    with system.openai() as client:
        response = client.completions.create(
            model=client.models.list().data[0].id,
            prompt=PROMPT,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
    return list(response.choices[0].token_ids)


def running_worker(system: Cluster) -> Worker | None:
    return next((one for one in system.workers if one.describe().load.running), None)


@pytest.mark.slow
def test_two_ranks_serve_whole_requests_and_a_lost_rank_costs_no_token(tiny_llama: Path) -> None:
    oracle = Oracle(tiny_llama)
    expected = oracle.greedy(oracle.tokenizer(PROMPT)["input_ids"], MAX_TOKENS, ignore_eos=True)
    with cluster(tiny_llama, worker={"tensor_parallel_size": 2}) as system:
        for worker in system.workers:
            description = worker.describe().worker
            assert description.layout.num_kv_heads == 1
            assert not description.kv_address and not description.transports
        assert ids_of(system) == expected
        answers: list[list[int]] = []
        request = threading.Thread(target=lambda: answers.append(ids_of(system)))
        request.start()
        # Either worker may have it, since both serve whole requests.
        busy = wait_until(lambda: running_worker(system), 20, "the request to run")
        process = busy.process
        assert process is not None
        below = descendants(process.pid)
        (rank,) = [pid for pid in below if "engine.parallel.rank" in command_line(pid)]
        os.kill(rank, signal.SIGKILL)
        request.join(60)
        assert answers == [expected]
        assert process.wait(20) != 0
        assert "was ended by signal SIGKILL" in process.log
        assert not any(alive(pid) for pid in below)
        busy.kill()
