"""What goes wrong and when: a list of blows from a seed, and who carries one out.

Invariant: of each role one worker is left in peace at any time, so that somebody is always there to
go on; which one changes. The list sees to that with the time that a worker is given to come
back; who carries it out on a busy machine leaves a blow out where that was too short.
"""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "freeze", "hang", "slow", "dark", "refuse", "drain"]
KINDS: tuple[Kind, ...] = ("kill", "kill", "freeze", "hang", "slow", "dark", "refuse", "drain")
"""freeze: all of a worker; hang: its engine, behind a service that still answers."""
LATER_FAULTS = (
    "kv.read:fail@0.2",
    "kv.read:short@0.2",
    "kv.read:corrupt@0.2",
    "kv.read:delay=300ms@0.3",
    "lease.renew:lost@0.5",
    "kv.probe:lost@0.5",
    "rpc.link.receive:delay=20ms@0.2",
    "rpc.link.send:delay=20ms@0.2",
    "rpc.link.send:cut@0.002",
    "rpc.link.open:refuse@0.3",
    "submit:refuse@0.2",
    "engine.step:raise@0.01",
)
"""What workers that were started again may do wrong besides."""
RETURN_S = 7.0
"""Time that a worker that was ended is given to be back, before another one is struck."""


@dataclass(frozen=True, slots=True)
class Blow:
    """One thing that goes wrong."""

    at_s: float
    kind: Kind
    worker: int
    """Index of the worker, prefill first."""
    for_s: float
    """How long it lasts; of a killed or drained one, until it is started again."""
    faults: str
    """Of a worker that is started again."""

    def __str__(self) -> str:
        after = f", then with {self.faults}" if self.faults else ""
        return f"{self.at_s:6.2f} s: {self.kind} worker {self.worker} for {self.for_s:.2f} s{after}"


def make_schedule(seed: int, *, prefill: int, decode: int, duration_s: float) -> list[Blow]:
    """The same list for the same seed."""
    source = random.Random(f"schedule/{seed}")
    hurt_until = [0.0] * (prefill + decode)
    blows = []
    at_s = 0.5
    while at_s < duration_s:
        kind = source.choice(KINDS)
        for_s = source.uniform(0.2, 3.0)
        faults = source.choice(LATER_FAULTS) if source.random() < 0.6 else ""
        role = range(prefill) if source.random() < 0.5 else range(prefill, prefill + decode)
        well = [worker for worker in role if hurt_until[worker] <= at_s]
        if len(well) > 1:
            worker = source.choice(well)
            ends = kind in ("kill", "drain")
            hurt_until[worker] = at_s + for_s + (RETURN_S if ends else 1.0)
            blows.append(Blow(at_s, kind, worker, for_s, faults if ends else ""))
        at_s += source.uniform(0.4, 2.0)
    return blows
