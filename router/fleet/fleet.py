"""Every worker that the router knows, and the tasks that keep their links open.

Owned by the router's entry point. What the workers say goes straight from their link to the
listener (dispatch); this only knows who is there.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import cast

import grpc

from router.fleet.discovery import Discovery, Member
from router.fleet.link import LinkListener, LinkSettings, Stream, WorkerLink, attach
from router.fleet.worker import Role, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus
from rpc.v1 import worker_pb2, worker_pb2_grpc


class Fleet:
    """Links to the workers that a Discovery tells of. Implements fleet.discovery.Members."""

    def __init__(
        self,
        discovery: Discovery,
        open_channel: Callable[[str], grpc.aio.Channel],
        settings: LinkSettings,
        attach: Callable[[grpc.aio.Channel], Stream] = attach,
    ) -> None:
        self._discovery = discovery
        self._open_channel = open_channel
        self._settings = settings
        self._attach = attach
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._listener: LinkListener | None = None
        self._group: asyncio.TaskGroup | None = None
        """Owns the links' tasks; None while `run` does not run."""

    async def run(self, listener: LinkListener) -> None:
        """Keep a link open to every listed worker until cancelled."""
        self._listener = listener
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._discovery.run(self)
        finally:
            self._group = None

    def add(self, address: str, member: Member) -> None:
        """A worker is listed; see Members."""
        link = self._links.get(address)
        if link is not None:
            self.update(address, member)  # it comes back while its link was ending
            return
        assert self._group is not None and self._listener is not None
        link = WorkerLink(
            address,
            member,
            self._open_channel,
            self._listener,
            self._settings,
            self._attach,
        )
        self._links[address] = link
        self._tasks[address] = self._group.create_task(self._keep(link), name=f"link {address}")

    def update(self, address: str, member: Member) -> None:
        """It is listed otherwise; see Members."""
        self._links[address].relist(member)

    def remove(self, address: str) -> None:
        """It is listed no longer; see Members. An open session lasts while it is at work."""
        link = self._links[address]
        link.relist(None)
        if link.info is None:
            self._tasks[address].cancel()
            self._forget(link)

    async def _keep(self, link: WorkerLink) -> None:
        await link.run()
        self._forget(link)

    def _forget(self, link: WorkerLink) -> None:
        """It is not run any more, so the next worker at its address gets another."""
        del self._links[link.address], self._tasks[link.address]

    @property
    def shortage(self) -> str:
        """Why no worker may be known, in words."""
        return self._discovery.shortage

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
        return await asyncio.gather(*(self._flush(address) for address in self._links))

    def describe(self) -> list[dict[str, object]]:
        """What is known of every worker; see FleetControl."""
        return [_about(link) for link in self._links.values()]

    async def _flush(self, address: str) -> dict[str, object]:
        async with self._open_channel(address) as channel:
            # The stub is typed for synchronous channels.
            stub = worker_pb2_grpc.WorkerStub(channel)
            call = cast(
                Awaitable[worker_pb2.FlushCacheResponse],
                stub.FlushCache(
                    worker_pb2.FlushCacheRequest(), timeout=self._settings.admin_timeout_s
                ),
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
        return [_status(link) for link in self._links.values()]

    @property
    def absent(self) -> dict[str, str]:
        """Workers that are not attached, and why."""
        return {each.address: each.cause for each in self.statuses if each.info is None}


def _status(link: WorkerLink) -> WorkerStatus:
    info = link.info
    return WorkerStatus(
        address=link.address,
        role=info.role if info is not None else link.member.role,
        pool=link.member.pool,
        state=link.state,
        cause=link.cause if info is None else "",
        info=info,
        load=link.load if info is not None else WorkerLoad(state=WorkerState.LOST),
    )


def _about(link: WorkerLink) -> dict[str, object]:
    about: dict[str, object] = {
        "address": link.address,
        "role": link.member.role,
        "state": link.state,
    }
    if link.member.pool:
        about["pool"] = link.member.pool
    info = link.info
    if info is None:
        return about | {"cause": link.cause}
    return about | {
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
