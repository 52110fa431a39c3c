"""How a worker meets its peers: the transport it offers and the hello that says so."""

from core.clock import monotonic
from kvtransfer.faulty import FaultyTransport
from kvtransfer.messages import Hello
from kvtransfer.rank_transport import RankTransport
from kvtransfer.ranked_transport import LET_GO_S, RankedTransport
from kvtransfer.select import could_use_nixl, open_transport
from kvtransfer.stamps import PoolStamps
from kvtransfer.wire import layout_from_proto
from kvtransfer.worker_transport import WorkerTransport
from rpc.v1 import worker_pb2
from rpc.v1.kv_ranks_pb2 import RankOpen
from telemetry.faults import Point
from worker.role import RoleContext
from worker.settings import WorkerSettings


def own_transport(settings: WorkerSettings, context: RoleContext) -> WorkerTransport:
    """Make the pools of this worker's ranks readable by peers, and peers' pools from here.

    Raises:
        TransferError: a rank's transport can't be opened.
        WorkerLostError: a rank is lost.
    """
    host = settings.own_host
    token = settings.auth_token.get_secret_value() if settings.auth_token else ""
    layout = layout_from_proto(context.description.layout)
    size = settings.tensor_parallel_size
    transport = open_transport(
        settings.kv_transport,
        context.pool,
        host=host,
        token=token,
        descriptor_bytes=settings.descriptor_bytes,
    )
    stamps = PoolStamps(context.pool, layout, size=size)
    own = RankTransport(transport, layout, stamps, size=size)
    if context.ranks is None:
        return _faulty(own, context)
    opening = RankOpen(
        layout=context.description.layout,
        size=size,
        transport=transport.name,
        host=host,
        token=token,
        descriptor_bytes=settings.descriptor_bytes,
    )
    try:
        return _faulty(RankedTransport(own, context.ranks, opening, let_go_s=LET_GO_S), context)
    except BaseException:
        own.close()
        raise


def _faulty(transport: WorkerTransport, context: RoleContext) -> WorkerTransport:
    if not context.faults.has(Point.KV_READ, Point.KV_STAMP):
        return transport
    return FaultyTransport(transport, context.pool, context.faults, monotonic)


def own_hello(
    description: worker_pb2.WorkerDescription,
    transport: WorkerTransport,
    *,
    lease_ttl_s: float = 0.0,
) -> Hello:
    """The hello that follows from what routers are told and from the transport in use."""
    return Hello(
        worker_id=description.worker_id,
        epoch=description.epoch,
        model_digest=description.model_digest,
        layout=layout_from_proto(description.layout),
        num_blocks=description.num_blocks,
        transport=transport.name,
        rank_metadata=transport.rank_metadata,
        lease_ttl_s=lease_ttl_s,
        could_use_nixl=transport.name == "tcp" and could_use_nixl(),
    )
