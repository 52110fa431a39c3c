"""Workers as placement sees them."""

from collections.abc import Iterable

from router.fleet.worker import KvLayout, Role, WorkerInfo, WorkerLoad
from router.placement.columns import WorkerColumns, WorkerView
from router.placement.cost import CostSettings

COST = CostSettings(prefill_tokens_per_s=1000.0, decode_step_s=0.01, transfer_bytes_per_s=1e6)
BLOCK_SIZE = 4


def make_info(role: str, worker_id: str = "w", **changes: object) -> WorkerInfo:
    values: dict[str, object] = {
        "worker_id": worker_id,
        "epoch": 1,
        "role": Role(role),
        "model": "m",
        "model_digest": b"digest",
        "layout": make_layout(),
        "num_blocks": 1000,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "vocab_size": 1000,
        "eos_token_ids": (2,),
        "kv_address": "host:1" if role == "prefill" else "",
    }
    return WorkerInfo(**{**values, **changes})  # type: ignore[arg-type]


def make_layout(block_bytes: int = 1000) -> KvLayout:
    return KvLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        block_size=BLOCK_SIZE,
        dtype="float32",
        block_bytes=block_bytes,
    )


def make_view(key: str, role: str, **changes: object) -> WorkerView:
    """A worker at time 0; what it has in its backlog it will have computed at its own rate."""
    info = {k: changes.pop(k) for k in list(changes) if k in WorkerInfo.__slots__}
    load = WorkerLoad(  # type: ignore[arg-type]
        **{k: changes.pop(k) for k in list(changes) if k in WorkerLoad.__slots__}
    )
    rate = load.prefill_tokens_per_s or COST.prefill_tokens_per_s
    return WorkerView(
        key=key,
        info=make_info(role, key, **info),
        load=load,
        **{"idle_at": load.backlog_tokens / rate, **changes},  # type: ignore[arg-type]
    )


def make_columns(views: Iterable[WorkerView]) -> WorkerColumns:
    columns = WorkerColumns(COST)
    for view in views:
        columns.put(view)
    return columns
