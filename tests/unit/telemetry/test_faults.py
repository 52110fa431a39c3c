"""Fault points: what a text means, what a wrong one is told, and that a schedule repeats."""

import logging
from pathlib import Path

import pytest

from telemetry.faults import (
    Effect,
    FaultPlan,
    Faults,
    InjectedFaultError,
    Point,
    Rule,
    fault_text,
    parse_faults,
)

TEXT = "kv.read:delay=200ms@0.1; rpc.link.send:cut@0.01;engine.step:raise; seed=7"


def test_a_text_is_read() -> None:
    assert parse_faults(TEXT) == FaultPlan(
        (
            Rule(Point.KV_READ, Effect.DELAY, 0.2, 0.1),
            Rule(Point.LINK_SEND, Effect.CUT, 0.0, 0.01),
            Rule(Point.ENGINE_STEP, Effect.RAISE, 0.0, 1.0),
        ),
        seed=7,
    )
    assert parse_faults("") == FaultPlan()
    assert parse_faults("submit:refuse # not today\n\n# seed=1\nseed=2").seed == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kv.rea:fail", "did you mean kv.read"),
        ("nonsense:fail", "kv.read, kv.probe, kv.stamp, lease.renew, rpc.link"),
        ("kv.read:cut", "there are: delay, fail, short, corrupt"),
        ("kv.read", "is not point:effect"),
        ("kv.read:delay", "needs a duration"),
        ("kv.read:delay=soon", "needs a duration"),
        ("kv.read:fail=1s", "only a delay"),
        ("kv.read:fail@2", "from 0 to 1"),
        ("kv.read:fail@often", "from 0 to 1"),
        ("seed=x", "whole number"),
    ],
)
def test_a_wrong_text_is_refused_with_what_there_is(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_faults(text)


def test_a_file_may_hold_the_text(tmp_path: Path) -> None:
    file = tmp_path / "faults"
    file.write_text("submit:refuse@0.5\nseed=3\n")
    assert parse_faults(fault_text(str(file))) == parse_faults("submit:refuse@0.5;seed=3")
    with pytest.raises(ValueError, match="no file"):
        fault_text(str(tmp_path / "missing"))
    assert fault_text(TEXT) == TEXT


def strikes(text: str, process: str, point: Point = Point.KV_READ) -> list[Rule | None]:
    faults = Faults(parse_faults(text), process)
    return [faults.at(point) for _ in range(200)]


def test_the_same_seed_strikes_at_the_same_times() -> None:
    first = strikes("kv.read:fail@0.3;seed=1", "d0")
    assert first == strikes("kv.read:fail@0.3;seed=1", "d0")
    assert 20 < sum(rule is not None for rule in first) < 100
    assert first != strikes("kv.read:fail@0.3;seed=2", "d0")
    assert first != strikes("kv.read:fail@0.3;seed=1", "d1")
    # Another rule changes nothing about when this one strikes.
    assert first == strikes("kv.read:fail@0.3;submit:refuse;seed=1", "d0")


def test_a_point_without_a_rule_never_strikes(caplog: pytest.LogCaptureFixture) -> None:
    assert not Faults()
    assert not any(strikes("submit:refuse", "d0"))
    assert not Faults(parse_faults("submit:refuse")).has(Point.KV_READ, Point.LINK_OPEN)
    with caplog.at_level(logging.WARNING):
        Faults().announce()
        assert not caplog.records
        Faults(parse_faults(TEXT)).announce()
    assert "FAULT INJECTION IS ON" in caplog.text and "kv.read:delay=0.2s@0.1" in caplog.text


async def test_a_message_of_a_stream_is_cut() -> None:
    faults = Faults(parse_faults("rpc.link.send:cut; rpc.link.receive:delay=1ms"))
    await faults.link(Point.LINK_RECEIVE)
    await faults.link(Point.LINK_OPEN)
    with pytest.raises(InjectedFaultError, match=r"rpc\.link\.send:cut"):
        await faults.link(Point.LINK_SEND)
