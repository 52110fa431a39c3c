"""What holds for every choice: who may be chosen, and that no burden makes a worker more wanted."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UnavailableError
from router.fleet.worker import WorkerState
from router.placement.choose import choose
from router.placement.columns import WorkerView
from router.placement.cost import Prompt
from router.placement.decision import Mode
from router.placement.prefix_walk import Held
from router.placement.prices import Demand, Outlook
from tests.support.router_placement import make_columns, make_layout, make_view

PROMPT = Prompt(num_tokens=100, max_new_tokens=20)
DIGESTS = (b"digest", b"other")
LAYOUTS = (make_layout(), make_layout(2000))


@st.composite
def fleets(draw: st.DrawFn) -> list[WorkerView]:
    views = []
    for i in range(draw(st.integers(1, 6))):
        role = draw(st.sampled_from(["prefill", "decode"]))
        exports = role == "prefill" and draw(st.booleans())
        views.append(
            make_view(
                f"w{i}",
                role,
                model_digest=draw(st.sampled_from(DIGESTS)),
                layout=draw(st.sampled_from(LAYOUTS)),
                kv_address="host:1" if exports else "",
                max_model_len=draw(st.sampled_from([119, 120])),
                state=draw(st.sampled_from([WorkerState.READY, WorkerState.DRAINING])),
                backlog_tokens=draw(st.integers(0, 500)),
                running=draw(st.integers(0, 9)),
                held_blocks=draw(st.sampled_from([0, 990])),
            )
        )
    return views


@settings(max_examples=300, deadline=None)
@given(
    fleets(),
    st.sets(st.sampled_from([f"w{i}" for i in range(6)])),
    st.sampled_from([None, *DIGESTS]),
    st.sampled_from([0, 200]),
)
def test_only_able_and_matching_workers_are_chosen(
    views: list[WorkerView], avoid: set[str], digest: bytes | None, local: int
) -> None:
    # Met elsewhere: Decode was told while prefill was known to be gone.
    demand = Demand(prompt=PROMPT, avoid=avoid, model_digest=digest)
    able = {
        view.key
        for view in views
        if view.load.state is WorkerState.READY
        and view.info.max_model_len >= PROMPT.total_tokens
        and digest in (None, view.info.model_digest)
        and view.key not in avoid
    }
    outlook = Outlook(local_prefill_max_tokens=local)
    try:
        placement = choose(make_columns(views), demand, outlook)
    except UnavailableError:
        assert not able
        return
    by_key = {view.key: view for view in views}
    worker = by_key[placement.worker]
    assert placement.worker in able
    if placement.mode is Mode.DISAGGREGATED:
        exporter = by_key[str(placement.prefill)]
        assert exporter.key in able and exporter.info.kv_address
        assert exporter.info.model_digest == worker.info.model_digest
        assert exporter.info.layout == worker.info.layout
        assert (exporter.info.role.value, worker.info.role.value) == ("prefill", "decode")
    else:
        assert placement.prefill is None
    assert all(term >= 0 for each in placement.candidates for term in each.terms.values())
    assert all(placement.cost_s <= other for other in placement.alternatives.values())


BURDENS = {
    "backlog": lambda view: replace(view, idle_at=view.idle_at + 1),
    "running": lambda view: replace(view, sent_requests=view.sent_requests + 4),
    "blocks": lambda view: replace(view, sent_blocks=view.sent_blocks + 500),
    "step": lambda view: replace(view, load=replace(view.load, decode_step_s=0.5)),
    "prefill": lambda view: replace(view, load=replace(view.load, prefill_tokens_per_s=5.0)),
    "link": lambda view: replace(view, load=replace(view.load, link_bytes_per_s={"w0": 10.0})),
}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), min_size=3, max_size=6),
    st.sampled_from(sorted(BURDENS)),
    st.dictionaries(st.sampled_from([f"w{i}" for i in range(6)]), st.integers(0, 25)),
    st.floats(0, 10),
)
def test_no_burden_makes_a_worker_cheaper(
    loads: list[tuple[int, int]], burden: str, matched: dict[str, int], arrivals: float
) -> None:
    """Whoever was not chosen is not chosen when it has more to do, and no term gets smaller."""
    views = [
        make_view(
            f"w{i}",
            "prefill" if i % 2 == 0 else "decode",
            backlog_tokens=backlog * 10,
            running=running,
            # Measured: what one that measured nothing is taken for depends on the others.
            prefill_tokens_per_s=1000.0,
            decode_step_s=0.01,
        )
        for i, (backlog, running) in enumerate(loads)
    ]
    demand, outlook = (
        Demand(prompt=PROMPT, held={key: Held(blocks) for key, blocks in matched.items()}),
        Outlook(arrivals_per_s=arrivals),
    )
    before = choose(make_columns(views), demand, outlook)
    for index, view in enumerate(views):
        burdened = [*views[:index], BURDENS[burden](view), *views[index + 1 :]]
        after = choose(make_columns(burdened), demand, outlook)
        assert after.cost_s >= before.cost_s - 1e-9
        if view.key not in (before.prefill, before.worker):
            assert view.key not in (after.prefill, after.worker)
        terms = {(each.worker, each.part): each.terms for each in before.candidates}
        for each in after.candidates:
            if each.worker == view.key and before.prefill == after.prefill:
                earlier = terms[each.worker, each.part]
                assert all(each.terms[name] >= earlier[name] - 1e-9 for name in earlier)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 24), st.integers(1, 25))
def test_more_cached_blocks_never_cost_more(matched: int, more: int) -> None:
    columns = make_columns([make_view("p", "prefill"), make_view("d", "decode")])
    costs = [
        choose(
            columns,
            Demand(prompt=PROMPT, held=dict.fromkeys("pd", Held(blocks))),
            Outlook(arrivals_per_s=2.0),
        ).cost_s
        for blocks in (matched, min(25, matched + more))
    ]
    assert np.diff(costs)[0] <= 0
