"""What a chaos run is to do, and what came of it."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.support.chaos_schedule import Blow, make_schedule

STEP_DELAY = "engine.step:delay=40ms"
"""Makes a tiny model slow enough for blows to fall amid answers, without work for the processor."""
WORKER = {
    "kv_cache_memory": "6MiB",
    "max_num_seqs": 32,
    "max_step_tokens": 64,
    "stall_after_s": "2s",
    "drain_timeout_s": "5s",
    "served_model_name": "chaos",
    "faults": STEP_DELAY,
}
ROUTER = {
    "worker_silence_s": "1500ms",
    "connect_timeout_s": "3s",
    "no_worker_grace_s": "30s",
    "request_timeout_s": "120s",
    "max_attempts": 12,
    "served_model_name": "chaos",
}
VARIED_WORKER: dict[str, Sequence[object]] = {
    "kv_cache_memory": ["1536KiB", "2MiB", "4MiB"],
    "host_kv_memory": [0, "2MiB"],
    "max_step_tokens": [32, 64, 512],
    "block_size": [8, 16],
    "attention_backend": ["auto", "torch_native"],
}
VARIED_ROUTER: dict[str, Sequence[object]] = {
    "local_prefill_max_tokens": [0, 40],
    "max_in_flight": [64, 1024],
    "faults": [
        "",
        "rpc.link.receive:cut@0.0005",
        "rpc.link.send:cut@0.001",
        "rpc.link.receive:delay=5ms@0.3",
    ],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What is done to the system. Everything but the processes' own timing follows from it."""

    seed: int
    requests: int = 200
    duration_s: float = 40.0
    prefill: int = 3
    decode: int = 3
    transport: str = "tcp"
    vary: bool = False
    """Other settings of workers and router with every seed."""

    @property
    def worker_settings(self) -> dict[str, object]:
        source = random.Random(f"workers/{self.seed}")
        return _varied(WORKER, VARIED_WORKER, source) if self.vary else dict(WORKER)

    @property
    def router_settings(self) -> dict[str, object]:
        source = random.Random(f"router/{self.seed}")
        return _varied(ROUTER, VARIED_ROUTER, source) if self.vary else dict(ROUTER)

    @property
    def schedule(self) -> list[Blow]:
        return make_schedule(
            self.seed, prefill=self.prefill, decode=self.decode, duration_s=self.duration_s
        )


@dataclass(slots=True)
class ChaosReport:
    """What came of it."""

    plan: ChaosPlan
    failures: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    """By kind of request."""
    near_ties: list[int] = field(default_factory=list)
    """Requests whose answers differ by rounding alone; see chaos_ties.py."""
    left_out: list[Blow] = field(default_factory=list)
    """Blows that would have left nobody to go on: others had not come back in time."""
    retries: dict[str, float] = field(default_factory=dict)
    balanced_after_s: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)
    log: str = ""

    def __str__(self) -> str:
        schedule = "\n".join(map(str, self.plan.schedule))
        return "\n".join(
            [
                f"plan: {self.plan}",
                f"workers: {self.plan.worker_settings}; router: {self.plan.router_settings}",
                schedule,
                f"answers: {dict(self.answers)}; attempts that failed: {self.retries}; "
                f"near ties: {self.near_ties}; phases {self.phases_s}; "
                f"balanced after {self.balanced_after_s:.1f} s",
                *(f"left out: {blow}" for blow in self.left_out),
                *(f"FAILURE {failure}" for failure in self.failures),
            ]
        )


def _varied(
    settings: Mapping[str, object], varied: Mapping[str, Sequence[object]], source: random.Random
) -> dict[str, object]:
    return {**settings, **{name: source.choice(each) for name, each in varied.items()}}
