"""What is remembered of responses, and whose goes first."""

import pytest

from router.access.caller import Caller
from router.api.errors import HttpError
from router.api.responses.store import ResponseStore, StoredResponse

ALICE, BOB = (Caller(name=name, tenant=name) for name in ("alice", "bob"))


def _response(tenant: str, size: int = 1) -> StoredResponse:
    return StoredResponse(tenant=tenant, body=b"{}", messages=(), size=size)


def _known(store: ResponseStore, caller: Caller, *names: str) -> str:
    known = ""
    for name in names:
        try:
            store.get(name, caller)
        except HttpError:
            continue
        known += name
    return known


@pytest.mark.parametrize("size", [1, 60])
def test_a_tenant_that_keeps_much_displaces_its_own(size: int) -> None:
    store = ResponseStore(capacity=4, capacity_bytes=200)
    store.keep("a", _response("alice", 20))
    for name in "vwxyz":
        store.keep(name, _response("bob", size))
    assert _known(store, ALICE, *"avwxyz") == "a"
    assert _known(store, BOB, *"avwxyz") == "xyz"
    store.get("x", BOB)
    store.keep("b", _response("alice", size))
    assert _known(store, BOB, *"xyz") == "xz"


def test_what_is_forgotten_leaves_its_room_to_others() -> None:
    store = ResponseStore(capacity=2, capacity_bytes=100)
    store.keep("a", _response("alice", 101))
    assert _known(store, ALICE, "a") == ""
    for name in "bcd":
        store.keep(name, _response("alice", 90))
        store.delete(name, ALICE)
    store.keep("e", _response("bob", 100))
    assert _known(store, BOB, "e") == "e"
