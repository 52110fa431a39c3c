"""Any sequence of changes, however lists and lost watches cut it, ends in what a list says."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.fleet.discovery import Member, tell_changes
from router.fleet.kubernetes.slices import census
from router.fleet.kubernetes.store import SliceStore
from tests.support.discovery import Told
from tests.support.kube.slices import census_of, endpoint, endpoint_slice

NAMES = ("a", "b", "c", "d")
_endpoints = st.lists(
    st.builds(
        endpoint,
        st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        terminating=st.booleans(),
        serving=st.booleans(),
        zone=st.sampled_from([None, "z1", "z2"]),
    ),
    max_size=3,
)
_slices = st.builds(
    endpoint_slice,
    st.sampled_from(NAMES),
    _endpoints,
    role=st.sampled_from(["prefill", "decode", None]),
    service=st.sampled_from(["s", "t"]),
    family=st.sampled_from(["IPv4", "IPv6"]),
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), _slices),
        st.tuples(st.just("delete"), st.sampled_from(NAMES)),
        st.tuples(st.sampled_from(["lose", "list", "bookmark"]), st.none()),
    ),
    max_size=25,
)


class Server:
    """Slices, and the lines of a watch from any version."""

    def __init__(self) -> None:
        self.version = 1
        self.slices: dict[str, Any] = {}
        self.lines: list[tuple[int, bytes]] = []

    def say(self, kind: str, item: dict[str, Any]) -> None:
        self.version += 1
        metadata = {**item["metadata"], "resourceVersion": str(self.version)}
        line = json.dumps({"type": kind, "object": {**item, "metadata": metadata}})
        self.lines.append((self.version, line.encode()))
        if kind == "DELETED":
            del self.slices[metadata["name"]]
        elif kind != "BOOKMARK":
            self.slices[metadata["name"]] = {**item, "metadata": metadata}


@given(_steps)
def test_events_end_in_what_a_list_says(steps: list[tuple[str, Any]]) -> None:
    server, store, told = Server(), SliceStore(), Told()
    known: dict[str, Member] = {}

    def follow() -> None:
        nonlocal known
        changed = False
        if not store.version:
            changed = store.replace(list(server.slices.values()), str(server.version))
        for version, line in server.lines:
            if version > int(store.version):
                changed |= store.take(line)[1]
        if changed:
            found = dict(census(store.slices).members)
            tell_changes(known, found, told)
            known = found

    watching = True
    for step, argument in steps:
        match step:
            case "put":
                old = server.slices.get(argument["metadata"]["name"])
                server.say("MODIFIED" if old else "ADDED", argument)
            case "delete" if argument in server.slices:
                server.say("DELETED", server.slices[argument])
            case "lose":
                watching = False
            case "list":
                store.forget_version()
                watching = True
            case "bookmark":
                server.say("BOOKMARK", {"metadata": {}})
                watching = True
        if watching:
            follow()
    follow()
    fresh = census_of(server.slices.values()).members
    assert told.members == fresh == known
    reordered = census_of(reversed(list(server.slices.values())))
    assert reordered.members == fresh


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "metadata",
                    "labels",
                    "endpoints",
                    "addresses",
                    "ports",
                    "conditions",
                    "name",
                    "port",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["metadata", "addressType", "endpoints", "ports"]), _json))
def test_a_slice_of_any_shape_hides_no_other(odd: dict[str, Any]) -> None:
    good = endpoint_slice("z", ["10.0.0.9"], service="good")
    assert "10.0.0.9:9001" in census_of([odd, good]).members
