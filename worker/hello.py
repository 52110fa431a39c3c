"""How a worker meets its peers: the transport it offers and the hello that says so."""

from core.kv_layout import KvLayout
from kvtransfer.messages import Hello
from kvtransfer.select import open_transport
from kvtransfer.transport import BlockPool, Transport
from rpc.v1 import worker_pb2
from worker.settings import WorkerSettings


def own_transport(settings: WorkerSettings, pool: BlockPool) -> Transport:
    """Make this worker's pool readable by peers as the settings say, and peers' pools from here.

    Raises:
        TransferError: the transport can't be opened.
    """
    return open_transport(
        settings.kv_transport,
        pool,
        host=settings.advertise_host or settings.host,
        token=settings.auth_token.get_secret_value() if settings.auth_token else "",
        descriptor_bytes=settings.descriptor_bytes,
    )


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
