import pytest

from core.errors import UnavailableError
from router.fleet.worker import Place, WorkerState
from router.placement.choose import choose
from router.placement.columns import WorkerView
from router.placement.cost import ASSUMED_HOST_BYTES_PER_S, SHARED_COST, Prompt
from router.placement.decision import Mode, Placement, Refusal
from router.placement.prefix_walk import Held
from router.placement.prices import Demand, Distrust, Outlook
from tests.support.router_placement import make_columns, make_layout, make_view

PROMPT = Prompt(num_tokens=100, max_new_tokens=20)


def place(*views: WorkerView, local: int = 0, **demand: object) -> Placement:
    given = Demand(**{"prompt": PROMPT, **demand})  # type: ignore[arg-type]
    return choose(make_columns(views), given, Outlook(local_prefill_max_tokens=local))


def test_least_backlog_wins() -> None:
    chosen = place(
        make_view("p0", "prefill", backlog_tokens=500),
        make_view("p1", "prefill", backlog_tokens=100),
        make_view("d0", "decode"),
    )
    assert (chosen.mode, chosen.prefill, chosen.worker) == (Mode.DISAGGREGATED, "p1", "d0")


def test_measured_rate_decides() -> None:
    slow = make_view("p0", "prefill", prefill_tokens_per_s=10.0)
    fast = make_view("p1", "prefill", prefill_tokens_per_s=5000.0, backlog_tokens=400)
    assert place(slow, fast, make_view("d0", "decode")).prefill == "p1"


@pytest.mark.parametrize(
    ("popularity", "backlog", "chosen"),
    [(0, 870, "cached"), (0, 890, "idle"), (9, 150, "cached"), (9, 170, "idle")],
)
def test_cached_prefix_is_worth_waiting_for_up_to_a_multiple(
    popularity: float, backlog: int, chosen: str
) -> None:
    """80 of 100 tokens are cached there. Where many ask for them, a second copy pays soon."""
    assert SHARED_COST == 10
    placement = place(
        make_view("cached", "prefill", backlog_tokens=backlog),
        make_view("idle", "prefill"),
        make_view("d0", "decode"),
        held={"cached": Held(20)},
        popularity=popularity,
    )
    assert placement.prefill == chosen


def test_at_least_one_token_is_left_to_compute() -> None:
    placement = place(
        make_view("p", "prefill"), make_view("d", "decode"), held={"p": Held(25), "d": Held(25)}
    )
    assert placement.cached_tokens == 99


@pytest.mark.parametrize(
    ("rate", "backlog", "chosen"), [(1e6, 10, "device"), (1e6, 30, "host"), (1e7, 10, "host")]
)
def test_copying_from_host_memory_is_waited_for_like_a_backlog(
    rate: float, backlog: int, chosen: str
) -> None:
    """80 tokens are 20 KB there, for 20 ms or 2 ms; the other has as many on its device."""
    placement = place(
        make_view("device", "prefill", backlog_tokens=backlog),
        make_view("host", "prefill", host_bytes_per_s=rate),
        make_view("d0", "decode"),
        held={"device": Held(20), "host": Held(20, 20)},
    )
    assert placement.prefill == chosen
    cached = {c.worker: (c.cached_tokens, c.host_tokens) for c in placement.candidates}
    assert cached == {"device": (80, 0), "host": (80, 80), "d0": (0, 0)}


def test_what_is_slower_to_copy_than_to_compute_is_computed() -> None:
    """20 KB at 100 KB/s take 0.2 s, 80 tokens 0.08 s; the first 5 blocks are on the device."""
    views = (make_view("p", "prefill", host_bytes_per_s=1e5), make_view("d", "decode"))
    (prefill, _) = place(*views, held={"p": Held(25, 20)}).candidates
    assert (prefill.cached_tokens, prefill.host_tokens) == (20, 0)
    assert prefill.terms["host_copy_s"] == 0 and prefill.terms["prefill_s"] == pytest.approx(0.08)


def test_rate_of_copies_that_was_not_measured_is_that_of_others_or_assumed() -> None:
    held = {"p": Held(20, 20)}
    unknown, decode = make_view("p", "prefill"), make_view("d", "decode")
    assert place(unknown, decode, held=held).as_dict()["host_copy_rate"] == {
        "bytes_per_s": round(ASSUMED_HOST_BYTES_PER_S),
        "measured": False,
    }
    other = make_view("d", "decode", host_bytes_per_s=4e6)
    placement = place(unknown, other, held=held)
    assert placement.host_copy is not None
    assert (placement.host_copy.bytes_per_s, placement.host_copy.measured) == (4e6, False)
    assert placement.candidates[0].terms["host_copy_s"] == pytest.approx(0.005)
    assert place(other, held={"d": Held(20)}).as_dict()["host_copy_rate"] is None


def test_decode_that_holds_the_prefix_in_host_memory_saves_the_transfer_for_a_copy() -> None:
    views = (make_view("p", "prefill"), make_view("d", "decode", host_bytes_per_s=1e6))
    terms = place(*views, held={"d": Held(20, 20)}).candidates[1].terms
    assert (terms["transfer_s"], terms["host_copy_s"]) == (
        pytest.approx(0.005),
        pytest.approx(0.02),
    )


def test_decode_that_holds_the_prefix_saves_the_transfer() -> None:
    views = (make_view("p", "prefill"), make_view("d0", "decode"), make_view("d1", "decode"))
    placement = place(*views, held={"d1": Held(20)})
    assert placement.worker == "d1"
    terms = {c.worker: c.terms["transfer_s"] for c in placement.candidates if c.part == "decode"}
    assert terms == {"d0": pytest.approx(0.025), "d1": pytest.approx(0.005)}


@pytest.mark.parametrize(
    "burden",
    [
        {"running": 4},
        {"waiting": 4},
        {"leases": 4},
        {"sent_requests": 4},
        {"running": 8},
        {"held_blocks": 990},
        {"sent_blocks": 990},
        {"awaited_blocks": 990},
        {"decode_step_s": 0.02},
    ],
)
def test_burdened_decode_worker_is_passed_over(burden: dict[str, object]) -> None:
    views = (make_view("p", "prefill"), make_view("a", "decode", **burden))
    assert place(*views, make_view("b", "decode", decode_step_s=0.01)).worker == "b"
    assert place(*views).worker == "a"


def test_a_worker_that_measured_nothing_is_taken_for_one_of_the_others() -> None:
    """By default it would seem slow beside GPUs, and decode never compute a prompt itself."""
    busy = make_view("p0", "prefill", prefill_tokens_per_s=50_000.0, backlog_tokens=50_000)
    slow = make_view("p1", "prefill", prefill_tokens_per_s=2000.0, backlog_tokens=50_000)
    fast = make_view("p2", "prefill", prefill_tokens_per_s=60_000.0, backlog_tokens=60_000)
    placement = place(busy, slow, fast, make_view("d", "decode"), local=4096)
    assert placement.mode is Mode.LOCAL
    (terms,) = [c.terms for c in placement.candidates if c.part == "local"]
    assert terms["prefill_s"] == pytest.approx(PROMPT.num_tokens / 50_000)
    assert place(busy, slow, fast, make_view("d", "decode", prefill_tokens_per_s=50.0)).mode is (
        Mode.DISAGGREGATED
    )


def test_equal_workers_take_turns() -> None:
    p, d = make_view("p", "prefill"), make_view("d", "decode")
    assert place(p, make_view("a", "decode", placed=3), make_view("b", "decode")).worker == "b"
    assert place(make_view("a", "prefill", placed=3), make_view("b", "prefill"), d).prefill == "b"


def test_pairs_only_within_one_digest_and_layout() -> None:
    """What others find out at transfer time, or not at all: llm-d#2433, vllm#55776."""
    # Met elsewhere: Layouts that do not fit were found out during the transfer, as a hang.
    placement = place(
        make_view("p0", "prefill", model_digest=b"other"),
        make_view("p1", "prefill", layout=make_layout(2000)),
        make_view("p2", "prefill", backlog_tokens=10_000),
        make_view("d0", "decode"),
    )
    assert placement.prefill == "p2"
    assert sorted(refusal.workers for refusal in placement.refused) == [("p0",), ("p1",)]


def test_pools_that_do_not_match_serve_alone() -> None:
    placement = place(
        make_view("p0", "prefill", model_digest=b"other", backlog_tokens=10),
        make_view("d0", "decode"),
    )
    assert (placement.mode, placement.worker, placement.prefill) == (Mode.DECODE_ONLY, "d0", None)
    assert "matching prefill" in placement.why


def test_prefill_worker_that_exports_nothing_is_not_paired() -> None:
    placement = place(make_view("p", "prefill", kv_address=""), make_view("d", "decode"))
    assert placement.prefill is None


@pytest.mark.parametrize(
    ("role", "mode"), [("prefill", Mode.PREFILL_ONLY), ("decode", Mode.DECODE_ONLY)]
)
def test_one_pool_serves_alone(role: str, mode: Mode) -> None:
    """Losing the only decode worker took the model down elsewhere: llm-d-router#2636."""
    placement = place(make_view("w0", role, running=3), make_view("w1", role))
    assert (placement.mode, placement.worker) == (mode, "w1")


@pytest.mark.parametrize(("matched", "mode"), [(24, Mode.LOCAL), (23, Mode.DISAGGREGATED)])
def test_nearly_cached_prompt_stays_on_decode(matched: int, mode: Mode) -> None:
    views = (make_view("p", "prefill"), make_view("d", "decode"))
    placement = place(*views, local=4, held={"d": Held(matched)})
    assert placement.mode is mode


def test_worker_that_failed_the_request_is_avoided_while_there_is_another() -> None:
    views = [make_view("p", "prefill"), make_view("d0", "decode"), make_view("d1", "decode")]
    assert place(*views, avoid={"d0"}).worker == "d1"
    alone = place(*views[:2], avoid={"p"}, allow_avoided=True)
    assert (alone.mode, alone.worker) == (Mode.DECODE_ONLY, "d0")
    with pytest.raises(UnavailableError, match="d0: failed this request"):
        place(views[1], avoid={"d0"})
    assert place(views[1], avoid={"d0"}, allow_avoided=True).worker == "d0"


def test_worker_that_fails_of_late_is_used_only_if_there_is_no_other() -> None:
    views = [make_view("p", "prefill"), make_view("d0", "decode"), make_view("d1", "decode")]
    shut = Distrust(workers={"d0": "fails of late"})
    chosen = place(*views, distrust=shut)
    assert chosen.worker == "d1" and "d0: fails of late" in map(str, chosen.refused)
    assert place(*views[:2], distrust=shut).mode is Mode.PREFILL_ONLY
    assert place(views[1], distrust=shut).worker == "d0"
    # One that failed others is better than one that failed this request.
    assert place(*views[1:], distrust=shut, avoid={"d1"}, allow_avoided=True).worker == "d0"
    # One that is not there any more, or was never, changes nothing.
    assert place(*views, distrust=Distrust(workers={"x": ""}, pairs={("x", "y"): ""})).prefill


def test_no_kv_moves_between_two_workers_that_failed_to_move_it() -> None:
    views = [make_view("p0", "prefill"), make_view("p1", "prefill", backlog_tokens=5000)]
    views.append(make_view("d", "decode"))
    one = Distrust(pairs={("p0", "d"): "hand-overs fail"})
    chosen = place(*views, distrust=one)
    assert (chosen.prefill, chosen.worker) == ("p1", "d")
    assert "p0 + d: hand-overs fail" in map(str, chosen.refused)
    both = Distrust(pairs={("p0", "d"): "x", ("p1", "d"): "x"})
    alone = place(*views, distrust=both)
    assert alone.prefill is None, "whoever it is computes the prompt itself"


def test_every_refusal_is_named() -> None:
    demand = Demand(prompt=PROMPT, model_digest=b"digest")
    views = [
        make_view("a", "prefill", state=WorkerState.DRAINING),
        make_view("b", "decode", max_model_len=119),
        make_view("c", "decode", model_digest=b"other"),
    ]
    with pytest.raises(UnavailableError) as caught:
        choose(
            make_columns(views), demand, Outlook(), absent=[Refusal(("e",), "connection refused")]
        )
    message = caught.value.message
    assert "a: is draining" in message
    assert "b: prompt and max_tokens make 120 tokens, its context holds 119" in message
    assert "c: serves another model" in message
    assert "e: connection refused" in message


def test_decision_explains_itself_in_json_values() -> None:
    record = place(make_view("p", "prefill"), make_view("d", "decode")).as_dict()
    candidates = record["candidates"]
    assert isinstance(candidates, list)
    for candidate in candidates:
        terms = {k: v for k, v in candidate.items() if k.endswith("_s") and k != "cost_s"}
        assert candidate["cost_s"] == pytest.approx(sum(terms.values()), abs=1e-5)
    assert record["mode"] == "disaggregated"


def test_measured_link_decides_between_pairs() -> None:
    """25 KB take 25 ms at the assumed rate, 0.25 s over the slow link and 2.5 ms over the fast."""
    views = (
        make_view("p0", "prefill", backlog_tokens=100),
        make_view("p1", "prefill"),
        make_view("d0", "decode", running=4, link_bytes_per_s={"p1": 1e7}),
        make_view("d1", "decode", link_bytes_per_s={"p0": 1e5, "p1": 1e5}),
    )
    placement = place(*views, prompt=Prompt(num_tokens=100, max_new_tokens=1))
    assert (placement.prefill, placement.worker) == ("p1", "d0")
    assert placement.as_dict()["transfer_rate"] == {"bytes_per_s": 10_000_000, "measured": True}
    terms = {c.worker: c.terms["transfer_s"] for c in placement.candidates if c.part == "decode"}
    assert terms == {"d0": pytest.approx(0.0025), "d1": pytest.approx(0.25)}


def test_unmeasured_link_goes_at_the_assumed_rate() -> None:
    decode = make_view("d", "decode", link_bytes_per_s={"other": 1e9})
    placement = place(make_view("p", "prefill"), decode)
    assert placement.as_dict()["transfer_rate"] == {"bytes_per_s": 1_000_000, "measured": False}
    assert place(decode).as_dict()["transfer_rate"] is None


def test_unmeasured_link_is_guessed_from_how_far_it_reaches() -> None:
    """25 KB take 25 ms within a host, 0.25 s between zones, and what was measured wins."""
    here, far = Place(zone="a", host="h"), Place(zone="b")
    views = [
        make_view("near", "prefill", place=here, backlog_tokens=20),
        make_view("far", "prefill", place=far),
    ]
    assert place(*views, make_view("d", "decode", place=here)).prefill == "near"
    assert place(*views, make_view("d", "decode")).prefill == "far"
    measured = make_view("d", "decode", place=here, link_bytes_per_s={"far": 1e7})
    assert place(*views, measured).prefill == "far"


def test_link_measured_before_its_prefill_worker_came_counts_once_it_comes() -> None:
    columns = make_columns([make_view("d", "decode", link_bytes_per_s={"p": 5.0})])
    columns.put(make_view("p", "prefill"))
    placement = choose(columns, Demand(prompt=PROMPT), Outlook())
    assert placement.transfer is not None
    assert (placement.transfer.bytes_per_s, placement.transfer.measured) == (5.0, True)


def test_prompt_is_computed_on_decode_only_where_that_is_cheaper() -> None:
    """Within the limit; there it holds up whoever decodes."""
    prefill = make_view("p", "prefill")
    short = Prompt(num_tokens=20, max_new_tokens=20)
    idle = place(prefill, make_view("d", "decode"), local=50, prompt=short)
    assert idle.mode is Mode.LOCAL
    assert set(idle.alternatives) == {"disaggregated"}
    busy = place(prefill, make_view("d", "decode", running=7), local=50, prompt=short)
    assert busy.mode is Mode.DISAGGREGATED
    assert busy.alternatives["local"] > busy.cost_s


def test_without_a_prefill_pool_prompts_do_not_meet_where_few_more_decode() -> None:
    """Whoever computes it stalls somebody; two in a row stall them twice as long at once."""
    waited = make_view("a", "decode", running=30, backlog_tokens=100)
    free = make_view("b", "decode", running=33)
    assert place(waited, free).worker == "b"
    crowded = make_view("b", "decode", running=90)
    assert place(waited, crowded).worker == "a"


def test_every_candidate_is_ranked_with_the_winner_first() -> None:
    views = [make_view(f"p{i}", "prefill", backlog_tokens=100 - i) for i in range(40)]
    placement = place(*views, make_view("d", "decode"))
    ranking = placement.rankings[0]
    assert ranking.considered == len(ranking.candidates()) == 40
    assert ranking.candidates()[0].worker == placement.prefill == "p39"
    shown = placement.as_dict()["candidates"]
    assert isinstance(shown, list) and len(shown) < 40


def test_worker_that_left_leaves_its_row_to_the_next() -> None:
    columns = make_columns([make_view("a", "decode"), make_view("b", "decode")])
    columns.drop("a")
    columns.put(make_view("c", "decode", running=7))
    assert {choose(columns, Demand(prompt=PROMPT), Outlook()).worker} == {"b"}
    columns.drop("b")
    placement = choose(columns, Demand(prompt=PROMPT), Outlook())
    assert [each.worker for each in placement.candidates] == ["c"]
