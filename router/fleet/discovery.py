"""Which workers there are: what a source of members tells the fleet, and the source that is a list.

The fleet runs one Discovery for as long as it lives. Invariant: a source says only what it knows;
one that has lost its own source of truth says nothing, so that no worker is dropped for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.errors import ConfigError
from router.fleet.worker import Place, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker as it is listed; what it says of itself when the router attaches wins."""

    role: Role
    pool: str = ""
    place: Place = field(default_factory=Place)
    draining: bool = False
    """It is about to end: it gets nothing new, and is left to finish what it has."""


class Members(Protocol):
    """Who is told. Called on the event loop; must not block or raise."""

    def add(self, address: str, member: Member) -> None:
        """A worker is listed at host:port."""

    def update(self, address: str, member: Member) -> None:
        """What is listed of it is another now."""

    def remove(self, address: str) -> None:
        """It is listed no longer."""


class Discovery(Protocol):
    """A source of members."""

    async def run(self, members: Members) -> None:
        """Tell of every worker and of every change until cancelled, or until none can come."""

    @property
    def shortage(self) -> str:
        """Why no worker may be known, as a sentence for whoever misses one."""


class StaticDiscovery:
    """The workers that the settings name."""

    shortage = "They have not been called yet."

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Take two lists of host:port.

        Raises:
            ConfigError: no worker is named, or one is in both lists.
        """
        if not prefill and not decode:
            raise ConfigError(
                "No worker is configured: set prefill, decode or both to host:port, or set "
                "discovery to kubernetes."
            )
        both = sorted(set(prefill) & set(decode))
        if both:
            raise ConfigError(f"{', '.join(both)} can't be both a prefill and a decode worker.")
        self._roles = dict.fromkeys(prefill, Role.PREFILL) | dict.fromkeys(decode, Role.DECODE)

    async def run(self, members: Members) -> None:
        """Tell of all of them, once."""
        for address, role in self._roles.items():
            members.add(address, Member(role=role))


def tell_changes(
    before: Mapping[str, Member], after: Mapping[str, Member], members: Members
) -> None:
    """Tell what leads from one set of members, by address, to another.

    Removals come last: a worker that moved to another address is known there before it is gone.
    """
    for address, member in after.items():
        if address not in before:
            members.add(address, member)
        elif before[address] != member:
            members.update(address, member)
    for address in before.keys() - after.keys():
        members.remove(address)
