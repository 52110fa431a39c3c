"""What the endpoints share, put together once by router/app.py."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from core.clock import Clock
from core.errors import OverloadedError
from router.access.caller import Caller
from router.access.door import forbidden
from router.access.salt import TenantSalt
from router.api.errors import ModelNotFoundError
from router.api.metrics import ApiMetrics
from router.api.reading import BodyReader
from router.api.settings import ApiSettings
from router.generation import Generator, ServedModel
from router.text.processor import TextProcessor


class RecentRequests:
    """Which sequences belonged to a request, for the newest requests only.

    A tenant's names are its own: it neither sees nor displaces what others call the same.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts: OrderedDict[tuple[str, str], Sequence[str]] = OrderedDict()

    def remember(self, tenant: str, name: str, parts: Sequence[str]) -> None:
        """Note the sequences of a request under one of its names; the newest wins."""
        self._parts[tenant, name] = parts
        self._parts.move_to_end((tenant, name))
        while len(self._parts) > self._capacity:
            self._parts.popitem(last=False)

    def parts(self, caller: Caller, name: str) -> Sequence[str]:
        """Ids of its sequences, as far as the caller may know of them.

        A name that is not known may be the id of one sequence.
        """
        own = self._parts.get((caller.tenant, name))
        if own is not None:
            return own
        if caller.admin:
            anyones = (parts for (_, each), parts in reversed(self._parts.items()) if each == name)
            return next(anyones, (name,))
        of_answer = self._parts.get((caller.tenant, name.rpartition("-")[0]), ())
        return (name,) if name in of_answer else ()


class Gate:
    """Bounds the requests inside the API."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0

    def __enter__(self) -> None:
        if self._inside >= self._limit:
            raise OverloadedError(
                f"The router is answering {self._limit} requests, as many as it takes; try again."
            )
        self._inside += 1

    def __exit__(self, *_: object) -> None:
        self._inside -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiParts:
    """Collaborators of every endpoint."""

    generator: Generator
    text: TextProcessor
    settings: ApiSettings
    metrics: ApiMetrics
    recent: RecentRequests
    gate: Gate
    bodies: BodyReader
    salt: TenantSalt
    clock: Clock

    @property
    def served_name(self) -> str:
        """The model's name for clients.

        Raises:
            UnavailableError: no worker has said yet what it serves.
        """
        return self.settings.served_model_name or self.generator.model.name

    def model(self, name: str | None, caller: Caller) -> ServedModel:
        """The model that a client means.

        Args:
            name: what the client sent; None for the only one.
            caller: who wants to use it.

        Raises:
            ModelNotFoundError: another one is served.
            HttpError: 403; it is not for this caller.
            UnavailableError: no worker has said yet what it serves.
        """
        if name is not None and name != self.served_name:
            raise ModelNotFoundError(name, self.served_name)
        if not caller.may_use(self.served_name):
            raise forbidden(caller, f"is the model {self.served_name!r}", param="model")
        return self.generator.model
