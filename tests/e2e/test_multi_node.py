"""Workers that span several nodes, in the whole system."""

from pathlib import Path

import pytest

from tests.e2e.test_tensor_parallel import PROMPT, STEP, answer, expected
from tests.support.cluster import cluster
from tests.support.models import make_checkpoint

TWO_NODES = {"nodes": 2, "tensor_parallel_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefill", "decode", "transport"), [(TWO_NODES, {}, "tcp"), ({}, TWO_NODES, "nixl")]
)
def test_kv_moves_between_a_worker_on_two_nodes_and_one_on_one(
    tmp_path: Path, prefill: dict[str, object], decode: dict[str, object], transport: str
) -> None:
    model = make_checkpoint(tmp_path)
    with cluster(
        model, transport=transport, worker=STEP, prefill_worker=prefill, decode_worker=decode
    ) as system:
        for number in range(2):
            prompt = f"{number}. {PROMPT * 2}"
            assert answer(system, prompt) == ("disaggregated", expected(model, prompt))
        system.wait_balanced()
