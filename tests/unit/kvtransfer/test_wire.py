"""Link messages survive the wire, and the wire can't smuggle in anything unbounded."""

from collections.abc import Callable

import pytest

from core.errors import TransferError
from core.tokens import TokenLogprobs
from kvtransfer import wire
from kvtransfer.messages import (
    Claim,
    Commit,
    DecodeMessage,
    Offer,
    PrefillMessage,
    Probe,
    Progress,
    Refused,
    Release,
    Renew,
    Renewed,
    Revoke,
)
from rpc.v1 import kv_export_pb2 as pb
from tests.support.kv_messages import KEY, make_commit, make_hello


@pytest.mark.parametrize(
    "message",
    [make_hello(), Claim(KEY), Renew(2**40), Release(KEY), Probe(KEY, 7)],
    ids=lambda m: type(m).__name__,
)
def test_decode_message_round_trip(message: DecodeMessage) -> None:
    data = wire.decode_to_proto(message).SerializeToString()
    assert wire.decode_from_proto(pb.DecodeMessage.FromString(data)) == message


@pytest.mark.parametrize(
    "message",
    [
        make_hello(ttl_s=12.5),
        Offer(KEY, 2**50, 7),
        Progress(1, 3, (9, 0, 2**31)),
        make_commit(),
        Commit(
            lease_id=1,
            num_tokens=2,
            model_digest=b"",
            epoch=2**63,
            first_token=0,
            logprobs=TokenLogprobs(-0.5, ((3, -0.5), (4, float("-inf")))),
        ),
        Revoke(KEY, "overloaded", "why"),
        Renewed(5),
        Refused("no"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_prefill_message_round_trip(message: PrefillMessage) -> None:
    data = wire.prefill_to_proto(message).SerializeToString()
    assert wire.prefill_from_proto(pb.PrefillMessage.FromString(data)) == message


def test_long_texts_are_cut_before_they_are_sent() -> None:
    message = wire.prefill_to_proto(Revoke(KEY, "x", "e" * 10_000))
    assert wire.prefill_from_proto(message) == Revoke(KEY, "x", "e" * wire.MAX_TEXT_CHARS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hello: setattr(hello, "worker_id", ""),
        lambda hello: setattr(hello, "worker_id", "w" * 300),
        lambda hello: setattr(hello, "model_digest", b"d" * 65),
        lambda hello: hello.rank_metadata.extend([b"m" * (1 << 19)] * 2),
        lambda hello: hello.rank_metadata.extend([b"m"] * wire.MAX_RANKS),
        lambda hello: setattr(hello, "lease_ttl_ms", 3_600_001),
        lambda hello: setattr(hello.layout, "dtype", "f" * 300),
    ],
)
def test_hello_out_of_bounds_is_refused(spoil: Callable[[pb.LinkHello], None]) -> None:
    message = wire.decode_to_proto(make_hello())
    spoil(message.hello)
    with pytest.raises(TransferError):
        wire.decode_from_proto(message)


@pytest.mark.parametrize(
    "message",
    [
        pb.PrefillMessage(),
        pb.PrefillMessage(progress=pb.Progress(block_ids=[1] * (wire.MAX_BLOCKS_PER_MESSAGE + 1))),
        pb.PrefillMessage(revoke=pb.Revoke(error_message="e" * 5000)),
        pb.PrefillMessage(refused=pb.Refused(reason="e" * 5000)),
        pb.PrefillMessage(offer=pb.Offer(request_id="r" * 300)),
        pb.PrefillMessage(commit=pb.Commit(model_digest=b"d" * 65)),
    ],
)
def test_prefill_message_out_of_bounds_is_refused(message: pb.PrefillMessage) -> None:
    with pytest.raises(TransferError):
        wire.prefill_from_proto(message)


def test_empty_decode_message_is_refused() -> None:
    with pytest.raises(TransferError):
        wire.decode_from_proto(pb.DecodeMessage())
