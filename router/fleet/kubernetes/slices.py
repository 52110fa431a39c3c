"""From EndpointSlices to members. Pure: what the API server sends goes in, workers come out.

The store parses each slice once, the watch takes a census of all after each change. Invariant: the
census depends on the set of slices alone, not on the order in which they came.

Source: discovery.k8s.io/v1 and what it asks of those who read it, that is to gather the slices of
a Service and to expect an endpoint in two of them while it moves between them
(kubernetes.io/docs/concepts/services-networking/endpoint-slices).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from router.fleet.discovery import Member
from router.fleet.worker import Place, Role

SERVICE_LABEL = "kubernetes.io/service-name"
ROLE_LABEL = "diptych.io/role"
POOL_LABEL = "diptych.io/pool"
PORT_NAME = "grpc"

Json = Mapping[str, object]


class Ignored(StrEnum):
    """Why an endpoint is not a member."""

    ROLE = "role"
    """Its slice has no role label, or one that is no role: it is of a Service of another kind."""
    PORT = "port"
    """Its slice has no TCP port of that name."""
    FAMILY = "family"
    """Its Service has IPv4 addresses too, or this one is no IP address at all."""
    ADDRESS = "address"
    """It has none."""
    CONFLICT = "conflict"
    """Another slice lists the same address for another role or pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one EndpointSlice says of workers; equal if two say the same."""

    name: str
    service: str
    """The Service that it belongs to; one that was made by hand belongs to itself."""
    family: str
    workers: tuple[tuple[str, Member], ...]
    """By host:port, in the order in which they are listed."""
    ignored: Mapping[Ignored, int]
    """Endpoints that are no workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Every worker that a set of slices lists."""

    members: Mapping[str, Member]
    """By host:port."""
    ignored: Mapping[Ignored, int]
    """Endpoints that were left out."""


def parse_slice(item: Json) -> Slice:
    """Read a slice in the form of discovery.k8s.io/v1.

    Anything that is missing or of another type than the API says counts as not said, so one odd
    slice hides no other. An endpoint that is terminating is draining, whether it still serves or
    not: how long it does is for the link to see. One that is not ready is a worker, for the same
    reason.
    """
    metadata = _mapping(item.get("metadata"))
    labels = _mapping(metadata.get("labels"))
    name, family = _text(metadata.get("name")), _text(item.get("addressType"))
    endpoints = [each for each in _list(item.get("endpoints")) if isinstance(each, Mapping)]
    role, port = _role(labels), _port(item)
    workers: list[tuple[str, Member]] = []
    ignored: Counter[Ignored] = Counter()
    if family not in ("IPv4", "IPv6"):
        ignored[Ignored.FAMILY] = len(endpoints)
    elif role is None:
        ignored[Ignored.ROLE] = len(endpoints)
    elif port is None:
        ignored[Ignored.PORT] = len(endpoints)
    else:
        for endpoint in endpoints:
            host = _address(endpoint)
            if not host:
                ignored[Ignored.ADDRESS] += 1
                continue
            place = Place(zone=_text(endpoint.get("zone")), host=_text(endpoint.get("nodeName")))
            draining = _mapping(endpoint.get("conditions")).get("terminating") is True
            pool = _text(labels.get(POOL_LABEL))
            member = Member(role=role, pool=pool, place=place, draining=draining)
            workers.append((f"[{host}]:{port}" if family == "IPv6" else f"{host}:{port}", member))
    return Slice(
        name=name,
        service=_text(labels.get(SERVICE_LABEL)) or name,
        family=family,
        workers=tuple(workers),
        ignored=ignored,
    )


def census(slices: Iterable[Slice]) -> Census:
    """Gather the members of all slices.

    - A Service of two families counts by its IPv4 slices alone: both name the same pods.
    - Of an address that is listed twice, the entry that is not terminating is the newer one; if
      they differ in role or pool, the first by the slices' names counts.
    """
    ordered = sorted(slices, key=lambda each: each.name)
    with_ipv4 = {each.service for each in ordered if each.family == "IPv4"}
    found: dict[str, Member] = {}
    ignored: Counter[Ignored] = Counter()
    for each in ordered:
        ignored.update(each.ignored)
        if each.family == "IPv6" and each.service in with_ipv4:
            ignored[Ignored.FAMILY] += len(each.workers)
            continue
        for address, member in each.workers:
            other = found.setdefault(address, member)
            if (other.role, other.pool) != (member.role, member.pool):
                ignored[Ignored.CONFLICT] += 1
            elif other.draining and not member.draining:
                found[address] = member
    return Census(members=found, ignored=ignored)


def _role(labels: Json) -> Role | None:
    try:
        return Role(_text(labels.get(ROLE_LABEL)))
    except ValueError:
        return None


def _port(item: Json) -> int | None:
    for port in map(_mapping, _list(item.get("ports"))):
        number = port.get("port")
        named = port.get("name") == PORT_NAME and port.get("protocol", "TCP") == "TCP"
        if named and isinstance(number, int) and 0 < number < 65536:
            return number
    return None


def _address(endpoint: Json) -> str:
    """The first one: consumers are to use no other, and Kubernetes lists none."""
    return next((text for each in _list(endpoint.get("addresses")) if (text := _text(each))), "")


def _mapping(value: object) -> Json:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
