"""Where the ranks of one model find each other, and how a rank is told.

Made by whoever starts ranks, before any of them; each rank opens its store from it. Needs no torch,
since a host's ranks may be started by a process that has none. Ranks of one host meet in a file in
memory, so that nothing listens beyond loopback; ranks of several meet at a port of rank 0's.
"""

import json
from dataclasses import asdict, dataclass

from engine.config import EngineConfig

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """As one host's ranks see it; one of `store_fd` and `port` is set."""

    own_host: str = LOOPBACK
    """Name or address that collectives of this host's ranks listen on."""
    store_fd: int | None = None
    """One host: descriptor of a file in memory, inherited by every rank under this number."""
    leader_host: str = ""
    """Several: name or address of rank 0's host."""
    port: int = 0
    """There."""
    name: str = ""
    """What these ranks' keys begin with; others may have met at that port before."""
    listen_fd: int | None = None
    """Rank 0 of several hosts: the socket that listens at the port."""

    @property
    def several_hosts(self) -> bool:
        """True if ranks are reached over a network."""
        return self.store_fd is None


def start_message(config: EngineConfig, rank: int, meeting: Meeting) -> bytes:
    """Body of the START frame of a rank."""
    told = {"config": asdict(config), "rank": rank, "meeting": asdict(meeting)}
    return json.dumps(told).encode()


def read_start(body: bytes) -> tuple[EngineConfig, int, Meeting]:
    """Configuration, rank and meeting of a START frame."""
    told: dict[str, object] = json.loads(body)
    fields, rank, meeting = told["config"], told["rank"], told["meeting"]
    assert isinstance(fields, dict) and isinstance(rank, int) and isinstance(meeting, dict)
    return EngineConfig(**fields), rank, Meeting(**meeting)
