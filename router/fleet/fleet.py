"""Every worker that the router knows, and the tasks that keep their links open.

Owned by the router's entry point. What the workers say goes straight from their link to the
listener (dispatch); this only knows who is there.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import cast

import grpc

from router.fleet.link import LinkListener, LinkSettings, WorkerLink
from router.fleet.worker import Role, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus
from rpc.v1 import worker_pb2, worker_pb2_grpc


class Fleet:
    """Links to a static list of workers."""

    def __init__(
        self,
        members: Mapping[str, Role],
        open_channel: Callable[[str], grpc.aio.Channel],
        settings: LinkSettings,
    ) -> None:
        self._members = dict(members)
        self._open_channel = open_channel
        self._settings = settings
        self._admin_timeout_s = settings.admin_timeout_s
        self._links: dict[str, WorkerLink] = {}

    async def run(self, listener: LinkListener) -> None:
        """Keep every link open until cancelled."""
        self._links = {
            address: WorkerLink(address, self._open_channel, listener, self._settings)
            for address in self._members
        }
        async with asyncio.TaskGroup() as group:
            for link in self._links.values():
                group.create_task(link.run(), name=f"link {link.address}")

    def send(self, worker: str, message: worker_pb2.RouterMessage) -> bool:
        """Queue a message to a worker without waiting; False if it can't reach it."""
        link = self._links.get(worker)
        return link is not None and link.send(message)

    def info(self, worker: str) -> WorkerInfo | None:
        """What a worker said of itself; None while it is not attached."""
        link = self._links.get(worker)
        return None if link is None else link.info

    async def flush_caches(self) -> list[dict[str, object]]:
        """Have every worker forget the cached blocks that nothing holds; see FleetControl."""
        return await asyncio.gather(*(self._flush(address) for address in self._members))

    def describe(self) -> list[dict[str, object]]:
        """What is known of every worker; see FleetControl."""
        shown: list[dict[str, object]] = []
        for address, listed in self._members.items():
            link = self._links.get(address)
            info = link.info if link is not None else None
            state = link.state if link is not None else WorkerState.LOST
            about: dict[str, object] = {"address": address, "role": listed, "state": state}
            if info is not None:
                about |= {
                    "role": info.role,
                    "worker_id": info.worker_id,
                    "model": info.model,
                    "model_digest": info.model_digest.hex(),
                    "num_blocks": info.num_blocks,
                    "max_model_len": info.max_model_len,
                    "max_num_seqs": info.max_num_seqs,
                    "layout": asdict(info.layout),
                    "kv_address": info.kv_address,
                }
            elif link is not None:
                about["cause"] = link.cause
            shown.append(about)
        return shown

    async def _flush(self, address: str) -> dict[str, object]:
        async with self._open_channel(address) as channel:
            # The stub is typed for synchronous channels.
            stub = worker_pb2_grpc.WorkerStub(channel)
            call = cast(
                Awaitable[worker_pb2.FlushCacheResponse],
                stub.FlushCache(worker_pb2.FlushCacheRequest(), timeout=self._admin_timeout_s),
            )
            try:
                response = await call
            except grpc.aio.AioRpcError as error:
                return {"address": address, "error": f"{error.code().name}: {error.details()}"}
        return {"address": address, "freed_blocks": response.freed_blocks}

    @property
    def census(self) -> list[tuple[Role, WorkerState]]:
        """Role and state of every worker; of one that is not attached, the role it is listed as."""
        return [(status.role, status.state) for status in self.statuses]

    @property
    def statuses(self) -> list[WorkerStatus]:
        """Every worker as it is now, in the order in which they are listed."""
        return [self._status(address, listed) for address, listed in self._members.items()]

    @property
    def absent(self) -> dict[str, str]:
        """Workers that are not attached, and why."""
        return {each.address: each.cause for each in self.statuses if each.info is None}

    def _status(self, address: str, listed: Role) -> WorkerStatus:
        link = self._links.get(address)
        info = link.info if link is not None else None
        if link is None or info is None:
            return WorkerStatus(
                address=address,
                role=listed,
                state=WorkerState.LOST,
                cause=link.cause if link is not None else "not reached yet",
                info=None,
                load=WorkerLoad(state=WorkerState.LOST),
            )
        return WorkerStatus(
            address=address, role=info.role, state=link.state, cause="", info=info, load=link.load
        )
