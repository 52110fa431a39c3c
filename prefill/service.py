"""The KvExport service of a prefill worker, in its service process: links in, frames onward."""

from collections.abc import AsyncIterator

import grpc

from rpc.auth import Credentials
from rpc.v1 import ipc_pb2, kv_export_pb2, kv_export_pb2_grpc
from worker.switchboard import Channel, Switchboard


class KvExportService(kv_export_pb2_grpc.KvExportServicer):
    """Carries each decode worker's link to the exporter in the engine process."""

    def __init__(self, switchboard: Switchboard) -> None:
        self._switchboard = switchboard

    async def Link(
        self,
        request_iterator: AsyncIterator[kv_export_pb2.DecodeMessage],
        context: (
            "grpc.aio.ServicerContext[kv_export_pb2.DecodeMessage, kv_export_pb2.PrefillMessage]"
        ),
    ) -> AsyncIterator[kv_export_pb2.PrefillMessage]:
        """One decode worker's link, for as long as its stream lives."""
        channel: Channel[kv_export_pb2.PrefillMessage] = self._switchboard.open()
        async with self._switchboard.carrying(channel, request_iterator, _command) as outgoing:
            async for message in outgoing:
                yield message


def _command(channel: int, message: kv_export_pb2.DecodeMessage) -> ipc_pb2.EngineCommand:
    return ipc_pb2.EngineCommand(decode=ipc_pb2.DecodeFrame(channel=channel, message=message))


class PrefillExtension:
    """What prefill adds to the service process. Implements `worker.process.Extension`."""

    def __init__(self, switchboard: Switchboard, credentials: Credentials) -> None:
        self._service = KvExportService(switchboard)

    def register(self, server: grpc.aio.Server) -> None:
        """Serve KvExport."""
        kv_export_pb2_grpc.add_KvExportServicer_to_server(self._service, server)

    def open_link(self, request: ipc_pb2.OpenLink) -> None:
        """Prefill is linked to; it never links."""
        raise ValueError(f"a prefill engine asked for a link to {request.address}")

    async def close(self) -> None:
        """Nothing was opened."""
