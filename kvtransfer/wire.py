"""Link messages to protobuf and back. The only part of kvtransfer that knows the stubs.

Called by the glue of both roles. What comes off the wire is bounded here, so that the state
machines only ever see values of a sane size; whether a value makes sense is theirs to judge.
"""

from core.errors import TransferError
from core.kv_layout import KvLayout
from core.tokens import TokenLogprobs
from kvtransfer.messages import (
    Claim,
    Commit,
    DecodeMessage,
    Hello,
    Key,
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
from rpc.v1 import worker_pb2

MAX_ID_CHARS = 256
MAX_TEXT_CHARS = 4096
MAX_DIGEST_BYTES = 64
MAX_RANKS = 64
MAX_METADATA_BYTES = 1 << 20
"""Of all ranks of a worker."""
MAX_BLOCKS_PER_MESSAGE = 1 << 20
MAX_TOP_LOGPROBS = 64
MAX_LEASE_TTL_S = 3600.0


def decode_to_proto(message: DecodeMessage) -> pb.DecodeMessage:
    """For the wire."""
    match message:
        case Hello():
            return pb.DecodeMessage(hello=_hello_to_proto(message))
        case Claim(key):
            claim = pb.Claim(request_id=key.request_id, attempt=key.attempt)
            return pb.DecodeMessage(claim=claim)
        case Renew(seq):
            return pb.DecodeMessage(renew=pb.Renew(seq=seq))
        case Release(key):
            release = pb.Release(request_id=key.request_id, attempt=key.attempt)
            return pb.DecodeMessage(release=release)
        case Probe(key, num_blocks):
            probe = pb.Probe(request_id=key.request_id, attempt=key.attempt, num_blocks=num_blocks)
            return pb.DecodeMessage(probe=probe)


def decode_from_proto(message: pb.DecodeMessage) -> DecodeMessage:
    """Off the wire.

    Raises:
        TransferError: empty, or a field is out of bounds; close the link.
    """
    match message.WhichOneof("body"):
        case "hello":
            return _hello_from_proto(message.hello)
        case "claim":
            return Claim(_key(message.claim))
        case "renew":
            return Renew(message.renew.seq)
        case "release":
            return Release(_key(message.release))
        case "probe":
            _bound("blocks", message.probe.num_blocks, MAX_BLOCKS_PER_MESSAGE)
            return Probe(_key(message.probe), message.probe.num_blocks)
        case _:
            raise TransferError("A decode worker sent a message of no known kind.")


def prefill_to_proto(message: PrefillMessage) -> pb.PrefillMessage:
    """For the wire."""
    match message:
        case Hello():
            return pb.PrefillMessage(hello=_hello_to_proto(message))
        case Offer(key, lease_id, num_tokens):
            offer = pb.Offer(
                request_id=key.request_id,
                attempt=key.attempt,
                lease_id=lease_id,
                num_tokens=num_tokens,
            )
            return pb.PrefillMessage(offer=offer)
        case Progress(lease_id, first_block, block_ids):
            progress = pb.Progress(lease_id=lease_id, first_block=first_block, block_ids=block_ids)
            return pb.PrefillMessage(progress=progress)
        case Commit():
            return pb.PrefillMessage(commit=_commit_to_proto(message))
        case Revoke(key, code, text):
            revoke = pb.Revoke(
                request_id=key.request_id,
                attempt=key.attempt,
                error_code=code,
                error_message=text[:MAX_TEXT_CHARS],
            )
            return pb.PrefillMessage(revoke=revoke)
        case Renewed(seq):
            return pb.PrefillMessage(renewed=pb.Renewed(seq=seq))
        case Refused(reason):
            return pb.PrefillMessage(refused=pb.Refused(reason=reason[:MAX_TEXT_CHARS]))


def prefill_from_proto(message: pb.PrefillMessage) -> PrefillMessage:
    """Off the wire.

    Raises:
        TransferError: empty, or a field is out of bounds; close the link.
    """
    match message.WhichOneof("body"):
        case "hello":
            return _hello_from_proto(message.hello)
        case "offer":
            offer = message.offer
            return Offer(_key(offer), offer.lease_id, offer.num_tokens)
        case "progress":
            progress = message.progress
            _bound("block ids", len(progress.block_ids), MAX_BLOCKS_PER_MESSAGE)
            return Progress(progress.lease_id, progress.first_block, tuple(progress.block_ids))
        case "commit":
            return _commit_from_proto(message.commit)
        case "revoke":
            revoke = message.revoke
            _bound("error_message characters", len(revoke.error_message), MAX_TEXT_CHARS)
            _bound("error_code characters", len(revoke.error_code), MAX_ID_CHARS)
            return Revoke(_key(revoke), revoke.error_code, revoke.error_message)
        case "renewed":
            return Renewed(message.renewed.seq)
        case "refused":
            _bound("reason characters", len(message.refused.reason), MAX_TEXT_CHARS)
            return Refused(message.refused.reason)
        case _:
            raise TransferError("A prefill worker sent a message of no known kind.")


def _bound(what: str, value: float, most: float) -> None:
    if value > most:
        raise TransferError(f"A link message holds {value} {what}, allowed are {most}.")


def _key(message: pb.Claim | pb.Release | pb.Probe | pb.Offer | pb.Revoke) -> Key:
    _bound("request_id characters", len(message.request_id), MAX_ID_CHARS)
    return Key(message.request_id, message.attempt)


def layout_to_proto(layout: KvLayout) -> worker_pb2.KvLayout:
    """For the wire."""
    return worker_pb2.KvLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dtype=layout.dtype,
        block_bytes=layout.block_bytes,
    )


def layout_from_proto(layout: worker_pb2.KvLayout) -> KvLayout:
    """Off the wire."""
    _bound("dtype characters", len(layout.dtype), MAX_ID_CHARS)
    return KvLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dtype=layout.dtype,
        block_bytes=layout.block_bytes,
    )


def _hello_to_proto(hello: Hello) -> pb.LinkHello:
    return pb.LinkHello(
        worker_id=hello.worker_id,
        epoch=hello.epoch,
        model_digest=hello.model_digest,
        layout=layout_to_proto(hello.layout),
        num_blocks=hello.num_blocks,
        transport=hello.transport,
        rank_metadata=hello.rank_metadata,
        lease_ttl_ms=round(hello.lease_ttl_s * 1000),
        could_use_nixl=hello.could_use_nixl,
        protocol=hello.protocol,
    )


def _hello_from_proto(hello: pb.LinkHello) -> Hello:
    _bound("worker_id characters", len(hello.worker_id), MAX_ID_CHARS)
    _bound("model_digest bytes", len(hello.model_digest), MAX_DIGEST_BYTES)
    _bound("transport characters", len(hello.transport), MAX_ID_CHARS)
    _bound("ranks", len(hello.rank_metadata), MAX_RANKS)
    _bound("rank_metadata bytes", sum(map(len, hello.rank_metadata)), MAX_METADATA_BYTES)
    _bound("seconds of lease ttl", hello.lease_ttl_ms / 1000, MAX_LEASE_TTL_S)
    if not hello.worker_id:
        raise TransferError("A hello names no worker.")
    return Hello(
        worker_id=hello.worker_id,
        epoch=hello.epoch,
        model_digest=hello.model_digest,
        layout=layout_from_proto(hello.layout),
        num_blocks=hello.num_blocks,
        transport=hello.transport,
        rank_metadata=tuple(hello.rank_metadata),
        lease_ttl_s=hello.lease_ttl_ms / 1000,
        could_use_nixl=hello.could_use_nixl,
        protocol=hello.protocol,
    )


def _commit_to_proto(commit: Commit) -> pb.Commit:
    message = pb.Commit(
        lease_id=commit.lease_id,
        num_tokens=commit.num_tokens,
        model_digest=commit.model_digest,
        epoch=commit.epoch,
        first_token=commit.first_token,
        cached_tokens=commit.cached_tokens,
    )
    if commit.logprobs is not None:
        message.logprobs.logprob = commit.logprobs.logprob
        for token_id, logprob in commit.logprobs.top:
            message.logprobs.top.add(token_id=token_id, logprob=logprob)
    return message


def _commit_from_proto(commit: pb.Commit) -> Commit:
    _bound("model_digest bytes", len(commit.model_digest), MAX_DIGEST_BYTES)
    _bound("top logprobs", len(commit.logprobs.top), MAX_TOP_LOGPROBS)
    logprobs = None
    if commit.HasField("logprobs"):
        top = tuple((top.token_id, top.logprob) for top in commit.logprobs.top)
        logprobs = TokenLogprobs(commit.logprobs.logprob, top)
    return Commit(
        lease_id=commit.lease_id,
        num_tokens=commit.num_tokens,
        model_digest=commit.model_digest,
        epoch=commit.epoch,
        first_token=commit.first_token,
        logprobs=logprobs,
        cached_tokens=commit.cached_tokens,
    )
