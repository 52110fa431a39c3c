"""Every worker that the router knows, and the tasks that keep their links open.

Owned by the router's entry point. What the workers say goes straight from their link to the
listener (dispatch); this only knows who is there.
"""

import asyncio
from collections.abc import Callable, Mapping

import grpc

from router.fleet.link import LinkListener, LinkSettings, WorkerLink
from router.fleet.worker import Role, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus
from rpc.v1 import worker_pb2


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
