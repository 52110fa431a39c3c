from typing import Any

import pytest

from core.errors import ErrorCode, InvalidRequestError
from router.api.requests import ChatRequest, CompletionRequest, read
from router.api.sampling import (
    choice_seed,
    output_limit,
    sampling_params,
    wanted_logprobs,
    wanted_tokens,
)
from router.generation import ServedModel

MODEL = ServedModel(name="m", max_model_len=100, vocab_size=50, eos_token_ids=(2,))


def _chat(**fields: Any) -> ChatRequest:
    return read(ChatRequest, {"messages": [{"role": "user", "content": "x"}]} | fields)


def _limit(wanted: int | None, default: int | None, prompt_tokens: int) -> int:
    return output_limit(wanted, default, prompt_tokens=prompt_tokens, model=MODEL, param="messages")


def test_first_choice_has_the_request_s_seed_and_others_their_own() -> None:
    seeds = [choice_seed(7, i) for i in range(4)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4
    assert seeds == [choice_seed(7, i) for i in range(4)]
    assert choice_seed(8, 1) != choice_seed(7, 1)


def test_seeds_are_in_range_also_for_negative_ones_and_for_none() -> None:
    assert choice_seed(-1, 0) == 2**64 - 1
    assert all(0 <= choice_seed(seed, 3) < 2**64 for seed in (-(2**63), 2**64 - 1, None))
    assert choice_seed(None, 0) != choice_seed(None, 0)


def test_default_limit_is_the_room_or_the_configured_one() -> None:
    assert _limit(None, None, 90) == 10
    assert _limit(None, 16, 50) == 16
    assert _limit(None, 16, 90) == 10
    assert _limit(10, 16, 90) == 10


@pytest.mark.parametrize(("wanted", "prompt"), [(None, 100), (1, 100), (None, 5000), (11, 90)])
def test_too_long_says_both_lengths(wanted: int | None, prompt: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        _limit(wanted, None, prompt)
    assert caught.value.code is ErrorCode.CONTEXT_LENGTH
    assert caught.value.param == "messages"
    assert str(prompt) in caught.value.message
    assert "100" in caught.value.message


def test_limit_has_two_names_for_chats() -> None:
    assert wanted_tokens(_chat(max_tokens=5)) == 5
    assert wanted_tokens(_chat(max_completion_tokens=6)) == 6
    assert wanted_tokens(_chat(max_completion_tokens=6, max_tokens=6)) == 6
    for fields, param in (
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            wanted_tokens(_chat(**fields))
        assert caught.value.param == param


def test_logprobs_differ_between_dialects() -> None:
    assert wanted_logprobs(_chat()) is None
    assert wanted_logprobs(_chat(logprobs=True)) == 0
    assert wanted_logprobs(_chat(logprobs=True, top_logprobs=3)) == 3
    assert wanted_logprobs(read(CompletionRequest, {"prompt": "x", "logprobs": 2})) == 2
    for fields in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}):
        with pytest.raises(InvalidRequestError) as caught:
            wanted_logprobs(_chat(**fields))
        assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 11}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_value_out_of_range_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sampling_params(_chat(**fields), max_tokens=10, seed=0, model=MODEL, structured=None)
    assert caught.value.param == param


def test_every_field_arrives() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"3": -5},
        "stop_token_ids": [4],
        "ignore_eos": True,
        "min_tokens": 2,
    }
    params = sampling_params(_chat(**fields), max_tokens=10, seed=9, model=MODEL, structured=None)
    changed = {"logit_bias": {3: -5.0}, "stop_token_ids": (4,)}
    for name, value in (fields | changed).items():
        assert getattr(params, name) == value, name
    assert (params.max_tokens, params.seed, params.logprobs) == (10, 9, None)


def test_top_k_fits_the_wire_whatever_was_asked() -> None:
    def top_k(value: int) -> int:
        return sampling_params(
            _chat(top_k=value), max_tokens=1, seed=0, model=MODEL, structured=None
        ).top_k

    assert (top_k(2**62), top_k(-1), top_k(0)) == (50, 0, 0)
