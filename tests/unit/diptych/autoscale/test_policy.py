"""The policy: up at once, down slowly, never on what is old or in part, always within bounds."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.autoscale.policy import Pace, PoolScaler, PoolSignals

PACE = Pace(
    min_replicas=1, max_replicas=20, up_pause_s=30, down_after_s=300, down_pause_s=60, down_part=0.1
)
EVERY_S = 15.0


def share(ready: int, ratio: float | None) -> PoolSignals:
    return PoolSignals(ready=ready, shares={"KV": ratio})


def strain(ready: int, ratio: float, busy: float = 0.5) -> PoolSignals:
    return PoolSignals(ready=ready, shares={"busy": busy}, strains={"backlog": ratio})


def after(
    scaler: PoolScaler, signals: PoolSignals | None, replicas: int, seconds: float, start: float = 0
) -> int:
    """Replicas after some time of the same signals, as if new replicas were ready at once."""
    now = start
    while now <= start + seconds:
        if signals is not None:
            signals = replace(signals, ready=replicas)
        replicas = scaler.decide(signals, replicas, now).replicas
        now += EVERY_S
    return replicas


def test_share_above_its_target_grows_the_pool_in_proportion_at_once() -> None:
    assert PoolScaler(PACE).decide(share(4, 1.5), 4, 0).replicas == 6
    assert PoolScaler(PACE).decide(share(4, 1.09), 4, 0).replicas == 4, "within the tolerance"
    assert PoolScaler(PACE).decide(share(4, 3.0), 4, 0).replicas == 8, "doubles at most"
    assert PoolScaler(PACE).decide(share(1, 9.0), 1, 0).replicas == 3, "or adds two"
    assert PoolScaler(PACE).decide(share(18, 1.5), 18, 0).replicas == 20


def test_pool_shrinks_only_after_fewer_were_enough_for_long_and_by_few() -> None:
    scaler = PoolScaler(PACE)
    assert after(scaler, share(10, 0.4), 10, 255) == 10
    assert after(scaler, share(10, 0.4), 10, 60, start=270) == 8
    # One moment of need starts the time over.
    assert scaler.decide(share(8, 1.0), 8, 345).replicas == 8
    assert after(scaler, share(8, 0.4), 8, 270, start=360) == 8


def test_strain_grows_the_pool_and_waits_for_what_it_asked_for() -> None:
    scaler = PoolScaler(PACE)
    assert scaler.decide(strain(4, 8.0), 4, 0).replicas == 6
    starting = strain(4, 8.0)
    assert [scaler.decide(starting, 6, at).replicas for at in (15, 30, 45)] == [6, 6, 6]
    ready = strain(6, 8.0)
    assert scaler.decide(ready, 6, 60).replicas == 6, "they have to work the backlog off first"
    assert scaler.decide(ready, 6, 76).replicas == 9


def test_what_was_too_few_is_too_few_again_for_the_same_load() -> None:
    scaler = PoolScaler(PACE)
    assert scaler.decide(strain(2, 1.2, busy=0.5), 2, 0).replicas == 3
    same = strain(3, 0.1, busy=0.33)
    assert after(scaler, same, 3, 1200, start=15) == 3
    less = strain(3, 0.1, busy=0.2)
    assert after(scaler, less, 3, 1200, start=1230) == 1


def test_pool_shrinks_only_to_what_has_room_to_spare() -> None:
    assert after(PoolScaler(PACE), share(2, 0.45), 2, 1200) == 2, "one would be at 90 %"
    assert after(PoolScaler(PACE), share(2, 0.35), 2, 400) == 1


def test_strain_near_its_limit_keeps_the_pool_from_shrinking() -> None:
    assert after(PoolScaler(PACE), strain(5, 0.9, busy=0.1), 5, 1200) == 5
    assert after(PoolScaler(PACE), strain(5, 0.5, busy=0.1), 5, 1200) == 1


def test_nothing_is_done_without_fresh_signals_and_nothing_shrinks_on_a_part() -> None:
    assert after(PoolScaler(PACE), None, 7, 3600) == 7
    part = replace(share(7, 0.1), complete=False)
    assert after(PoolScaler(PACE), part, 7, 3600) == 7
    assert PoolScaler(PACE).decide(replace(part, shares={"KV": 1.5}), 7, 0).replicas == 11
    assert after(PoolScaler(PACE), share(7, None), 7, 3600) == 7
    assert after(PoolScaler(PACE), PoolSignals(ready=0), 7, 60) == 7
    scaler = PoolScaler(PACE)
    assert after(scaler, share(7, 0.1), 7, 200) == 7
    assert scaler.decide(None, 7, 215).replicas == 7
    assert after(scaler, share(7, 0.1), 7, 270, start=230) == 7, "what was not seen may have been"


def test_bounds_hold_and_a_pool_scaled_to_none_by_hand_is_left_alone() -> None:
    assert PoolScaler(PACE).decide(share(30, 0.9), 30, 0).replicas == 20
    assert PoolScaler(replace(PACE, min_replicas=3)).decide(share(1, 0.1), 1, 0).replicas == 3
    assert PoolScaler(PACE).decide(share(0, 9.0), 0, 0).replicas == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(0, 10)),
            st.one_of(st.none(), st.floats(0, 10)),
            st.integers(-3, 0),
            st.booleans(),
            st.booleans(),
        ),
        max_size=60,
    ),
    st.integers(1, 30),
)
def test_any_history_keeps_bounds_and_pace(
    turns: list[tuple[float | None, float | None, int, bool, bool]], replicas: int
) -> None:
    scaler, down_at = PoolScaler(PACE), -1e9
    for index, (ratio, pull, missing, fresh, complete) in enumerate(turns):
        now = index * EVERY_S
        signals = PoolSignals(
            ready=max(0, replicas + missing),
            shares={"KV": ratio},
            strains={"ITL": pull},
            complete=complete,
        )
        chosen = scaler.decide(signals if fresh else None, replicas, now).replicas
        if not fresh:
            assert chosen == replicas
        if chosen > replicas:
            assert chosen <= min(PACE.max_replicas, max(2 * replicas, replicas + 2))
        elif chosen < replicas and replicas <= PACE.max_replicas:
            assert complete
            assert chosen >= max(PACE.min_replicas, replicas - max(1, int(0.1 * replicas)))
            assert now - down_at >= PACE.down_pause_s
            assert now >= 0.9 * PACE.down_after_s
            down_at = now
        replicas = chosen
