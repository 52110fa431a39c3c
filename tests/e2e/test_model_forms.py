"""Every form that a model may come in, through the whole system."""

from pathlib import Path

from tests.support.cluster import Cluster, cluster
from tests.support.models import make_gguf
from tests.support.oracle import Oracle

PROMPT = "The quick brown fox"


def greedy(system: Cluster) -> list[int]:
    with system.openai() as client:
        model = client.models.list().data[0].id
        response = client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=16,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
    return list(response.choices[0].token_ids)


def test_gguf_file_is_served_as_it_is(tiny_llama: Path) -> None:
    oracle = Oracle(tiny_llama)
    expected = oracle.greedy(oracle.tokenizer(PROMPT)["input_ids"], 16, ignore_eos=True)
    with cluster(make_gguf(tiny_llama)) as system:
        assert greedy(system) == expected


def test_dummy_weights_of_one_seed_are_one_model(tiny_llama: Path) -> None:
    """Prefill and decode make the same weights, or their digests would keep them apart."""
    worker = {"load_format": "dummy", "seed": 3}
    with cluster(tiny_llama, transport="tcp", worker=worker) as system:
        first = greedy(system)
        assert greedy(system) == first
        system.wait_balanced()
        description = system.decode[0].describe().worker
        assert description.model_digest == system.prefill[0].describe().worker.model_digest
