from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.token_batch import TokenRow, token_batch, token_rows
from rpc.v1 import worker_pb2

uint32 = st.integers(0, 2**32 - 1)


@st.composite
def rows(draw: st.DrawFn) -> TokenRow:
    token_ids = draw(st.lists(uint32, min_size=1, max_size=draw(st.sampled_from([1, 3]))))
    scores = [worker_pb2.TokenLogprobs(logprob=-float(i)) for i in range(len(token_ids))]
    return TokenRow(
        draw(st.text(max_size=3)),
        draw(uint32),
        draw(uint32),
        token_ids,
        draw(st.sampled_from([(), scores])),
        draw(st.none() | st.just(0) | uint32),
    )


@given(st.lists(rows(), max_size=5))
def test_rows_are_what_was_put_into_a_batch(put: list[TokenRow]) -> None:
    wire = token_batch(put).SerializeToString()
    got = [TokenRow(*row) for row in token_rows(worker_pb2.TokenBatch.FromString(wire))]
    assert [row._replace(logprobs=list(row.logprobs)) for row in got] == [
        row._replace(logprobs=list(row.logprobs)) for row in put
    ]


def test_the_usual_step_says_nothing_twice() -> None:
    batch = token_batch([TokenRow("a", 1, 7, [5]), TokenRow("b", 1, 8, [6])])
    assert not batch.counts and not batch.notes


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: batch.attempts.append(1),
        lambda batch: batch.first_indexes.pop(),
        lambda batch: batch.request_ids.append("c"),
        lambda batch: batch.token_ids.append(1),
        lambda batch: batch.token_ids.pop(),
        lambda batch: batch.counts.append(1),
        lambda batch: batch.counts.__setitem__(0, 0),
        lambda batch: batch.notes.add(row=2),
        lambda batch: batch.notes[0].logprobs.pop(),
    ],
)
def test_columns_that_do_not_fit_each_other_are_refused(
    spoil: Callable[[worker_pb2.TokenBatch], object],
) -> None:
    scores = [worker_pb2.TokenLogprobs(logprob=-1.0)] * 2
    batch = token_batch([TokenRow("a", 1, 7, [5, 6], scores), TokenRow("b", 1, 8, [6])])
    spoil(batch)
    with pytest.raises(ValueError, match="came"):
        token_rows(batch)
