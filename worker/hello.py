"""What a worker says of itself at the start of a KvExport link."""

from core.kv_layout import KvLayout
from kvtransfer.messages import Hello
from kvtransfer.transport import Transport
from rpc.v1 import worker_pb2


def own_hello(
    description: worker_pb2.WorkerDescription, transport: Transport, *, lease_ttl_s: float = 0.0
) -> Hello:
    """The hello that follows from what routers are told and from the transport in use."""
    layout = description.layout
    return Hello(
        worker_id=description.worker_id,
        epoch=description.epoch,
        model_digest=description.model_digest,
        layout=KvLayout(
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            dtype=layout.dtype,
            block_bytes=layout.block_bytes,
        ),
        num_blocks=description.num_blocks,
        transport=transport.name,
        transport_metadata=transport.metadata(),
        lease_ttl_s=lease_ttl_s,
    )
