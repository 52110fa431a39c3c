"""Workers whose model lies on several ranks, in the whole system."""

from pathlib import Path

import pytest

from tests.support.cluster import Cluster, cluster
from tests.support.models import make_checkpoint
from tests.support.oracle import Oracle

PROMPT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4
MAX_TOKENS = 24
WORKER = {"max_step_tokens": 32}


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose KV heads four ranks can share."""
    return make_checkpoint(tmp_path_factory.mktemp("four-heads"), num_key_value_heads=4)


@pytest.fixture(scope="module")
def expected(four_heads: Path) -> list[int]:
    oracle = Oracle(four_heads)
    return oracle.greedy(oracle.tokenizer(PROMPT)["input_ids"], MAX_TOKENS, ignore_eos=True)


def answer(system: Cluster) -> tuple[str, list[int]]:
    """How a request was served, and its tokens."""
    with system.openai() as client:
        response = client.completions.with_raw_response.create(
            model=client.models.list().data[0].id,
            prompt=PROMPT,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
    ids = list(response.parse().choices[0].token_ids)  # type: ignore[attr-defined]
    return response.headers["x-diptych-mode"], ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [(1, 2, "nixl"), (2, 1, "nixl"), (2, 2, "nixl"), (2, 4, "tcp")],
)
def test_kv_moves_between_workers_of_any_number_of_ranks(
    four_heads: Path, expected: list[int], prefill: int, decode: int, transport: str
) -> None:
    with cluster(
        four_heads,
        transport=transport,
        worker=WORKER,
        prefill_worker={"tensor_parallel_size": prefill},
        decode_worker={"tensor_parallel_size": decode},
    ) as system:
        for worker in system.workers:
            description = worker.describe().worker
            assert description.layout.num_kv_heads == 4, "of all ranks"
            assert description.kv_address and list(description.transports) == [transport]
        assert answer(system) == ("disaggregated", expected)
        # Again with the first blocks cached on both sides.
        assert answer(system) == ("disaggregated", expected)
        system.wait_balanced()
