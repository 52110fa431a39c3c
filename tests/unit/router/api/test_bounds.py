"""How much a JSON body may hold."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequestError
from router.api import bounds
from router.api.bounds import check_bounds

TEXT = st.text(st.sampled_from('"\\,[]{}: aé\n'), max_size=8)
JSON = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)


def counts(value: Any) -> tuple[int, int, int]:
    """Arrays and objects, strings, and at least how many values, as they are inside `value`."""
    match value:
        case dict():
            inner = [counts(each) for each in value.values()]
            own = (1, len(value), max(1, len(value)))
        case list():
            inner = [counts(each) for each in value]
            own = (1, 0, max(1, len(value)))
        case _:
            return (0, int(isinstance(value, str)), 0)
    containers, strings, values = (sum(part) for part in zip(own, *inner, strict=True))
    return containers, strings, values


@given(value=JSON, ascii_only=st.booleans())
def test_what_is_counted_is_what_is_there(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    for name, there in zip(("CONTAINERS", "STRINGS", "VALUES"), counts(value), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bounds, f"MAX_{name}", there)
            check_bounds(body)
            if there:
                patch.setattr(bounds, f"MAX_{name}", there - 1)
                with pytest.raises(InvalidRequestError, match=f"holds {there} "):
                    check_bounds(body)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [list(range(131_072))] * 16},
        {"prompt": '{"a": [1, 2, "b"]},\n' * 400_000},
        {"messages": [{"role": "user", "content": '"hello", she said'}] * 8192},
        {"tools": [{"function": {"name": "f", "parameters": {"enum": ["x"] * 1000}}}] * 128},
    ],
)
def test_honest_bodies_fit(body: object) -> None:
    check_bounds(orjson.dumps(body))
