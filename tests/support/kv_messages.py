"""Builders for unit tests of the hand-over machines."""

from core.errors import ErrorCode
from core.kv_layout import KvLayout
from kvtransfer.messages import Commit, Hello, Key

BLOCK_SIZE = 4
LAYOUT = KvLayout(
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    block_size=BLOCK_SIZE,
    dtype="float32",
    block_bytes=512,
)
DIGEST = b"digest"
EPOCH = 77
KEY = Key("r", 0)
LOST = ErrorCode.KV_TRANSFER


def make_hello(
    worker_id: str = "P",
    *,
    epoch: int = EPOCH,
    digest: bytes = DIGEST,
    layout: KvLayout = LAYOUT,
    transport: str = "tcp",
    ttl_s: float = 10.0,
) -> Hello:
    return Hello(
        worker_id=worker_id,
        epoch=epoch,
        model_digest=digest,
        layout=layout,
        num_blocks=100,
        transport=transport,
        rank_metadata=(b"where", b"there"),
        lease_ttl_s=ttl_s,
    )


def make_commit(
    lease_id: int = 1,
    *,
    num_tokens: int = 6,
    digest: bytes = DIGEST,
    epoch: int = EPOCH,
) -> Commit:
    return Commit(
        lease_id=lease_id,
        num_tokens=num_tokens,
        model_digest=digest,
        epoch=epoch,
        first_token=42,
        cached_tokens=4,
    )
