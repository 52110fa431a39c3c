"""Workers that span several nodes, in the whole system."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.test_tensor_parallel import PROMPT, QUICK, STEP, Answering, answer, expected
from tests.support.cluster import Worker, cluster
from tests.support.models import make_checkpoint
from tests.support.process import alive, descendants, frozen, wait_until

TWO_NODES: dict[str, object] = {"nodes": 2, "tensor_parallel_size": 2, "node_timeout_s": "4s"}
LONG = 10
"""Repetitions of the prompt whose computing takes long enough to be interrupted."""


@pytest.mark.slow
def test_prefill_on_two_nodes_serves_like_one_and_costs_no_token_when_a_node_dies(
    tmp_path: Path,
) -> None:
    model = make_checkpoint(tmp_path, "Qwen3MoeForCausalLM")  # half of the experts on each node
    # Steps so small that prefill is seen at work however seldom it is asked.
    small = {**TWO_NODES, "max_step_tokens": 16}
    with cluster(model, transport="tcp", worker=STEP, prefill_worker=small) as system:
        (prefill,) = system.prefill
        assert answer(system, PROMPT) == ("disaggregated", expected(model, PROMPT))
        system.wait_balanced()
        answers: list[tuple[str, list[int]]] = []
        long = PROMPT * 45
        request = Answering(system, long, answers)
        request.start()
        wait_until(lambda: prefill.describe().load.running, 30, "prefill to be busy")
        lose_a_node(prefill, signal.SIGKILL, "its connection broke")
        request.join(60)
        assert [ids for _, ids in answers] == [expected(model, long)]
        prefill.kill()
        assert answer(system, "Hello")[0] == "decode_only"


@pytest.mark.slow
def test_a_node_that_freezes_while_decode_on_two_computes_costs_no_token(slow_llama: Path) -> None:
    with cluster(
        slow_llama,
        worker=STEP,
        prefill_worker={"lease_ttl_s": "4s"},
        decode_worker=TWO_NODES,
        router=QUICK,
    ) as system:
        (decode,) = system.decode
        assert answer(system, PROMPT) == ("disaggregated", expected(slow_llama, PROMPT))
        answers: list[tuple[str, list[int]]] = []
        long = PROMPT * LONG
        request = Answering(system, long, answers)
        request.start()
        wait_until(lambda: decode.describe().load.held_blocks, 30, "decode to be busy")
        lose_a_node(decode, signal.SIGSTOP, "no sign of life for 4.0 s")
        request.join(60)
        assert [ids for _, ids in answers] == [expected(slow_llama, long)]
        decode.kill()
        system.wait_balanced()


def lose_a_node(worker: Worker, number: signal.Signals, said: str) -> None:
    leader, (node,) = worker.process, worker.others
    assert leader is not None
    below = [*descendants(leader.pid), *descendants(node.pid)]
    with ExitStack() as stack:
        if number == signal.SIGSTOP:
            for pid in (node.pid, *descendants(node.pid)):
                stack.enter_context(frozen(pid))
        else:
            os.kill(node.pid, number)
        assert leader.wait(20) == 3
        assert f"Node 1 (127.0.0.2) was lost: {said}" in leader.log
    if number == signal.SIGSTOP:
        assert node.wait(20) == 3
        assert f"The leader at {worker.address} is gone" in node.log
    wait_until(lambda: not any(alive(pid) for pid in below), 20, "every rank to end")
