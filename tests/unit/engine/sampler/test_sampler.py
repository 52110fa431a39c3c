from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import SampleSpec
from engine.sampler.sampler import sample
from tests.support.sampling import AllowedIds
from tests.support.sampling import make_spec as spec

VOCAB = 64


def one(logits: torch.Tensor, what: SampleSpec) -> int:
    return sample(logits.clone()[None], [what])[0].token_id


def support(logits: torch.Tensor, draws: int = 600, **params: Any) -> set[int]:
    """Tokens that show up over many positions."""
    specs = [spec(position=i, **params) for i in range(draws)]
    return {s.token_id for s in sample(logits.repeat(draws, 1), specs)}


def row(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


def test_greedy_batch_takes_the_largest_logit_of_each_row() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1))
    results = sample(logits.clone(), [spec(temperature=0)] * 5)
    assert [r.token_id for r in results] == logits.argmax(-1).tolist()
    assert all(r.logprobs is None for r in results)


def test_sampling_frequencies_follow_the_softmax() -> None:
    probs = (0.5, 0.25, 0.15, 0.1)
    n = 4000
    results = sample(row(*probs).repeat(n, 1), [spec(position=i, seed=9) for i in range(n)])
    for token_id, expected in enumerate(probs):
        share = sum(r.token_id == token_id for r in results) / n
        assert share == pytest.approx(expected, abs=0.03)


def test_temperature_sharpens_and_a_tiny_one_does_not_overflow() -> None:
    logits = torch.tensor([80.0, 79.0, -80.0])
    assert support(logits, temperature=1e-4) == {0}
    assert support(logits, temperature=1.0) == {0, 1}
    assert support(logits, temperature=90.0) == {0, 1, 2}


def test_top_k_keeps_the_k_most_likely() -> None:
    assert support(row(0.1, 0.4, 0.2, 0.3), top_k=2) == {1, 3}
    assert support(row(0.1, 0.4, 0.2, 0.3), top_k=99) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probs = row(0.1, 0.4, 0.2, 0.3)
    assert support(probs, top_p=0.65) == {1, 3}
    assert support(probs, top_p=0.75) == {1, 2, 3}
    assert support(probs, top_p=1e-6) == {1}


def test_top_p_works_on_what_top_k_left() -> None:
    # Of the kept 0.4, 0.3, 0.2 the first two are 78 %, though only 70 % of all.
    assert support(row(0.1, 0.4, 0.2, 0.3), top_k=3, top_p=0.75) == {1, 3}


def test_top_p_looks_past_its_first_guess_when_the_distribution_is_flat() -> None:
    size = 5000
    logits = torch.linspace(0.5, 0, size)
    order = torch.softmax(logits, 0).cumsum(0)
    last = int((order < 0.5).sum())
    assert last > 1024
    drawn = support(logits, draws=2000, top_p=0.5)
    assert max(drawn) <= last
    assert max(drawn) > 1024


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert support(row(0.1, 0.4, 0.2, 0.3), min_p=0.6) == {1, 3}


def test_presence_and_frequency_penalties_count_only_the_output() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    assert one(logits, spec(temperature=0, presence_penalty=0.5, prompt=(0,))) == 0
    assert one(logits, spec(temperature=0, presence_penalty=0.5, output=(0,))) == 1
    assert one(logits, spec(temperature=0, frequency_penalty=0.06, output=(0,))) == 0
    assert one(logits, spec(temperature=0, frequency_penalty=0.06, output=(0, 0))) == 1


def test_repetition_penalty_counts_prompt_and_output_and_respects_sign() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.1])
    assert one(logits, spec(temperature=0, repetition_penalty=1.5, prompt=(0,))) == 1
    assert one(logits, spec(temperature=0, repetition_penalty=1.5, output=(0,))) == 1
    negative = logits[2:]
    assert one(negative, spec(temperature=0, repetition_penalty=1.5, prompt=(0,))) == 1


def test_logit_bias_adds_and_ignores_ids_outside_the_vocabulary() -> None:
    logits = torch.tensor([1.0, 0.0, 0.5])
    assert one(logits, spec(temperature=0, logit_bias={1: 2.0, 99: 100.0})) == 1
    assert one(logits, spec(temperature=0, logit_bias={0: -100.0})) == 2


def test_banned_ids_are_never_sampled() -> None:
    logits = torch.tensor([9.0, 0.0, 0.5])
    assert one(logits, spec(temperature=0, banned=(0,))) == 2
    specs = [spec(position=i, banned=(0, 2)) for i in range(50)]
    assert {s.token_id for s in sample(logits.repeat(50, 1), specs)} == {1}


def test_only_what_the_mask_allows_is_sampled_whatever_the_filters_would_keep() -> None:
    logits = torch.linspace(0, 5, 70)
    allowed = (0, 31, 32, 64)
    for temperature in (0.0, 1.0, 100.0):
        specs = [
            spec(
                position,
                mask=AllowedIds(70, *allowed),
                temperature=temperature,
                top_k=50,
                logit_bias={64: -100.0},
            )
            for position in range(20)
        ]
        drawn = {result.token_id for result in sample(logits.repeat(20, 1), specs)}
        assert drawn <= set(allowed)
        assert drawn == {32} or temperature > 0


def test_logprobs_are_of_unmodified_logits_with_the_most_likely_first() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    expected = torch.log_softmax(logits, 0).tolist()
    biased = spec(temperature=0.5, logit_bias={2: 100.0}, logprobs=2)
    plain = spec(temperature=0, logprobs=0)
    first, second, third = sample(logits.repeat(3, 1), [biased, spec(temperature=0), plain])
    assert first.token_id == 2
    assert first.logprobs is not None
    assert first.logprobs.logprob == pytest.approx(expected[2])
    assert [token_id for token_id, _ in first.logprobs.top] == [0, 1]
    assert [value for _, value in first.logprobs.top] == pytest.approx(expected[:2])
    assert second.logprobs is None
    assert third.logprobs is not None
    assert third.logprobs.top == ()
    assert third.logprobs.logprob == pytest.approx(expected[0])


_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 5, 40]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "seed": st.integers(0, 2**64 - 1),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logprobs": st.sampled_from([None, 3]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_params, st.integers(0, 1000)), min_size=1, max_size=6), st.integers(0, 9)
)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(
    rows: list[tuple[dict[str, Any], int]], data_seed: int
) -> None:
    generator = torch.Generator().manual_seed(data_seed)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 3
    specs = [
        spec(position=position, prompt=(1, 2), output=(3, 4, 4), **params)
        for params, position in rows
    ]
    together = sample(logits.clone(), specs)
    alone = [sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(specs)]
    assert together == alone
