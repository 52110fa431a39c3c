"""The KvExport links of a decode worker, in its service process: dialled on demand."""

import asyncio
import logging

import grpc

from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.v1 import ipc_pb2, kv_export_pb2, kv_export_pb2_grpc
from worker.switchboard import Channel, Switchboard

log = logging.getLogger(__name__)


class DecodeExtension:
    """What decode adds to the service process. Implements `worker.process.Extension`."""

    def __init__(self, switchboard: Switchboard, credentials: Credentials) -> None:
        self._switchboard = switchboard
        self._credentials = credentials
        self._links: set[asyncio.Task[None]] = set()

    def register(self, server: grpc.aio.Server) -> None:
        """Decode serves nothing of its own."""

    def open_link(self, request: ipc_pb2.OpenLink) -> None:
        """Dial; the engine hears by the peer's hello, or by the channel's end."""
        # Opened before the task runs: the engine's hello is right behind this request.
        channel: Channel[kv_export_pb2.DecodeMessage] = self._switchboard.open(request.channel)
        link = asyncio.create_task(self._run(channel, request.address))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _run(self, channel: Channel[kv_export_pb2.DecodeMessage], address: str) -> None:
        with self._switchboard.serving(channel):
            async with open_channel(address, self._credentials) as connection:
                stub = kv_export_pb2_grpc.KvExportStub(connection)
                call = stub.Link(channel.outgoing())
                try:
                    await self._switchboard.pump(channel, call, _command)
                finally:
                    call.cancel()
            log.info("link to %s ended: %s", address, channel.close_reason)

    async def close(self) -> None:
        """Drop all links."""
        for link in list(self._links):
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)


def _command(channel: int, message: kv_export_pb2.PrefillMessage) -> ipc_pb2.EngineCommand:
    return ipc_pb2.EngineCommand(prefill=ipc_pb2.PrefillFrame(channel=channel, message=message))
