"""Named fault points: places where a process can be told to fail, for tests and game days.

Off unless a process's `faults` setting names some, and then in nobody's way: the pieces that carry
faults out are wrapped around the real ones only if `Faults` says that a rule is there for them.
Each entry point makes one `Faults` and passes it down. Invariant: what rule number i does at its
n-th chance follows from (seed, process, i, n) alone, so a schedule can be played again.
"""

import asyncio
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path

log = logging.getLogger(__name__)


class Point(StrEnum):
    """Where something can be made to fail."""

    KV_READ = "kv.read"
    """A READ of KV blocks, by the decode worker."""
    KV_PROBE = "kv.probe"
    """A decode worker's request to measure a link."""
    KV_STAMP = "kv.stamp"
    """A decode worker's look at the test block that came over a link."""
    LEASE_RENEW = "lease.renew"
    """A decode worker's sign of life, which keeps its leases."""
    LINK_OPEN = "rpc.link.open"
    """Opening a stream: of a router to a worker, of a decode to a prefill worker."""
    LINK_SEND = "rpc.link.send"
    """A message written to a stream, at either end of it."""
    LINK_RECEIVE = "rpc.link.receive"
    """A message read from a stream, at either end of it."""
    ENGINE_STEP = "engine.step"
    """One step of the engine."""
    SUBMIT = "submit"
    """A request that arrives at a worker."""


class Effect(StrEnum):
    """What happens there."""

    DELAY = "delay"
    FAIL = "fail"
    SHORT = "short"
    """Some of it arrives, and that is noticed."""
    CORRUPT = "corrupt"
    """Something else arrives: of a READ the transport notices, of a stamp only who looks."""
    LOST = "lost"
    CUT = "cut"
    REFUSE = "refuse"
    RAISE = "raise"


_EFFECTS = {
    Point.KV_READ: (Effect.DELAY, Effect.FAIL, Effect.SHORT, Effect.CORRUPT),
    Point.KV_PROBE: (Effect.LOST,),
    Point.KV_STAMP: (Effect.CORRUPT,),
    Point.LEASE_RENEW: (Effect.LOST,),
    Point.LINK_OPEN: (Effect.REFUSE,),
    Point.LINK_SEND: (Effect.DELAY, Effect.CUT),
    Point.LINK_RECEIVE: (Effect.DELAY, Effect.CUT),
    Point.ENGINE_STEP: (Effect.DELAY, Effect.RAISE),
    Point.SUBMIT: (Effect.REFUSE,),
}
_ITEM = re.compile(r"(?P<point>[^:@=]+):(?P<effect>[^=@]+)(=(?P<value>[^@]*))?(@(?P<chance>.*))?")
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s)?")


class InjectedFaultError(ConnectionError):
    """What a fault point raises where the real thing would break."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What may happen at a point, and how often."""

    point: Point
    effect: Effect
    seconds: float
    """Of a delay; else 0."""
    chance: float
    """From 0 to 1."""

    def __str__(self) -> str:
        value = f"={self.seconds:g}s" if self.effect is Effect.DELAY else ""
        return f"{self.point}:{self.effect}{value}@{self.chance:g}"


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """What the text of a `faults` setting says."""

    rules: tuple[Rule, ...] = ()
    seed: int = 0


def parse_faults(text: str) -> FaultPlan:
    """Read `point:effect[=duration][@chance]` items and `seed=N`, parted by semicolons or lines.

    What follows a `#` up to the end of its line is left out. Without a chance it always happens.

    Raises:
        ValueError: an item is none of these; the message names what there is.
    """
    rules: list[Rule] = []
    seed = 0
    lines = [line.partition("#")[0] for line in text.splitlines()]
    for item in (part.strip() for line in lines for part in line.split(";")):
        if item.startswith("seed="):
            number = item.removeprefix("seed=").strip()
            if not number.isdecimal():
                raise ValueError(f"the seed must be a whole number, not `{number}`")
            seed = int(number)
        elif item:
            rules.append(_rule(item))
    return FaultPlan(tuple(rules), seed)


def fault_text(value: str) -> str:
    """Check the value of a `faults` setting, reading the file if it names one; returns the text.

    Raises:
        ValueError: the file can't be read, or there is no such fault.
    """
    if value and not re.search(r"[:=;#\n]", value):
        try:
            value = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"`{value}` is no fault such as kv.read:fail@0.1, and no file: {error}"
            ) from None
    parse_faults(value)
    return value


def _rule(item: str) -> Rule:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise ValueError(f"`{item}` is not point:effect, as in kv.read:delay=200ms@0.1")
    point = _named("fault point", match["point"].strip(), list(Point))
    effect = _named(f"effect of {point}", match["effect"].strip(), _EFFECTS[Point(point)])
    seconds = _seconds(item, match["value"], timed=effect == Effect.DELAY)
    return Rule(Point(point), Effect(effect), seconds, _chance(item, match["chance"]))


def _named(what: str, name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no {what} `{name}`; {hint}there are: {', '.join(known)}")


def _seconds(item: str, value: str | None, *, timed: bool) -> float:
    if not timed:
        if value is not None:
            raise ValueError(f"`{item}`: only a delay has a duration")
        return 0.0
    match = _DURATION.fullmatch((value or "").strip())
    if match is None:
        raise ValueError(f"`{item}`: a delay needs a duration, as in delay=200ms")
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)


def _chance(item: str, value: str | None) -> float:
    try:
        chance = 1.0 if value is None else float(value)
    except ValueError:
        chance = -1.0
    if not 0 <= chance <= 1:
        raise ValueError(f"`{item}`: the chance after @ is a number from 0 to 1")
    return chance


class _Armed:
    """A rule with its own sequence of chances."""

    def __init__(self, rule: Rule, source: random.Random) -> None:
        self.rule = rule
        self._source = source

    def strikes(self) -> bool:
        return self._source.random() < self.rule.chance


class Faults:
    """The fault points of one process."""

    def __init__(self, plan: FaultPlan | None = None, process: str = "") -> None:
        """Arm a plan's rules.

        Args:
            plan: None: nothing ever fails here.
            process: name of this process; those of different names fail at different times.
        """
        plan = plan or FaultPlan()
        self._armed: dict[Point, list[_Armed]] = {}
        for number, rule in enumerate(plan.rules):
            source = random.Random(f"{plan.seed}/{process}/{number}")
            self._armed.setdefault(rule.point, []).append(_Armed(rule, source))
        self._plan = plan

    def __bool__(self) -> bool:
        return bool(self._armed)

    def has(self, *points: Point) -> bool:
        """True if something may happen at one of these points."""
        return any(point in self._armed for point in points)

    def announce(self) -> None:
        """Warn loudly if there are any; each process does so as it starts."""
        if self:
            rules = "; ".join(map(str, self._plan.rules))
            log.warning(
                "FAULT INJECTION IS ON: this process fails on purpose (%s; seed %d). "
                "Unset `faults` to serve users.",
                rules,
                self._plan.seed,
            )

    def at(self, point: Point) -> Rule | None:
        """What happens at this point this time; None: nothing.

        Every rule of the point uses up one chance, and the first that strikes is taken.
        """
        struck = [armed.rule for armed in self._armed.get(point, ()) if armed.strikes()]
        if not struck:
            return None
        level = logging.DEBUG if struck[0].effect is Effect.DELAY else logging.INFO
        log.log(level, "injected fault: %s", struck[0])
        return struck[0]

    async def link(self, point: Point) -> None:
        """Let one message pass a point of a stream, perhaps late.

        Raises:
            InjectedFaultError: the stream is cut, or refused.
        """
        rule = self.at(point)
        if rule is None:
            return
        if rule.effect is not Effect.DELAY:
            raise InjectedFaultError(f"injected fault {rule.point}:{rule.effect}")
        await asyncio.sleep(rule.seconds)
