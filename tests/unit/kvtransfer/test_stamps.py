"""Stamps: equal for workers of any number of ranks, unlike each other, and harmless in a pool."""

import numpy as np
import pytest
import torch

from core.errors import TransferError
from kvtransfer.stamps import PoolStamps
from kvtransfer.transport import ReadState
from tests.support.kv import HostPool, finish
from tests.support.kv_ranks import ranked_worker, whole_layout

LAYOUT = whole_layout(3, 4)


@pytest.mark.parametrize(("source_size", "own_size"), [(1, 1), (2, 4), (4, 1), (8, 2)])
def test_a_stamp_is_known_again_on_every_rank(source_size: int, own_size: int) -> None:
    with (
        ranked_worker(LAYOUT, source_size, 6) as source,
        ranked_worker(LAYOUT, own_size, 6) as own,
    ):
        source.transport.stamp(4, "probe/1")
        own.transport.connect("p", LAYOUT, source.transport.rank_metadata)
        assert not own.transport.bears(1, "probe/1")
        assert finish(own.transport.read("p", [(4, 1)])) is ReadState.DONE
        assert own.transport.bears(1, "probe/1")
        assert not own.transport.bears(1, "probe/2")
        own.pools[-1].data[1, -1] ^= 1
        assert not own.transport.bears(1, "probe/1")
        for pool in source.pools:
            assert not pool.data[[0, 1, 2, 3, 5]].any()


def test_a_rank_that_does_not_stamp_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.ranked_transport.STAMP_S", 0.1)
    with ranked_worker(LAYOUT, 2, 6) as worker:
        worker.ranks.frozen.add(1)
        with pytest.raises(TransferError, match=r"Ranks \[1\]"):
            worker.transport.stamp(0, "probe/1")
        worker.ranks.frozen.clear()
        worker.transport.stamp(0, "probe/1")
        assert worker.transport.bears(0, "probe/1")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_may_look_at_a_stamp(dtype: str) -> None:
    pool = HostPool(2, 65536)
    PoolStamps(pool, pool.layout).write(1, "probe/1")
    values = torch.from_numpy(pool.words[1].view(np.uint8)).view(getattr(torch, dtype))
    assert values.any() and torch.isfinite(values).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_memory_that_can_not_be_reached_is_an_error_of_its_own() -> None:
    pool = HostPool(2, 4096)
    pool.device_id = 0
    for use in (PoolStamps(pool, pool.layout).write, PoolStamps(pool, pool.layout).holds):
        with pytest.raises(TransferError):
            use(1, "probe/1")
