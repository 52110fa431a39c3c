"""Who sent a request, and what that lets them do.

The door finds the Caller of a request; endpoints ask it. A tenant is what shares: cached blocks,
turns in the queue, stored responses and the sight of each other's requests. No request is without
a caller; where the router asks for no keys, everyone is ANYONE.
"""

from dataclasses import dataclass
from enum import Enum, auto

from router.admission import Priority


class Access(Enum):
    """What a path asks of its callers where keys are needed."""

    OPEN = auto()
    """Nothing: probes."""
    KEY = auto()
    """Any key."""
    ADMIN = auto()
    """A key that says `admin`."""
    PAGE = auto()
    """The same, of a browser, which asks its user for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What a key stands for; never the key itself."""

    name: str
    """Of the key; empty without keys."""
    tenant: str
    """Empty without keys."""
    admin: bool = False
    models: frozenset[str] | None = None
    """Names of the models that it may use; None: every one."""
    priority: Priority = Priority.NORMAL
    """Class of requests that ask for none."""
    best_priority: Priority = Priority.NORMAL
    """The most urgent class that they may ask for."""

    def may_use(self, model: str) -> bool:
        """Whether the model of that name is for this caller."""
        return self.models is None or model in self.models

    def may_see(self, tenant: str) -> bool:
        """Whether what belongs to a tenant is shown to this caller."""
        return self.admin or tenant == self.tenant


ANYONE = Caller(name="", tenant="", admin=True, best_priority=Priority.HIGH)
"""Whoever calls a router without keys."""
