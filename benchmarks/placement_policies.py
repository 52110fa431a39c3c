"""Ways to choose workers, side by side in the placement simulator: the router's own, and others.

All of them learn when a first token and when an end reach the router; only the router's own hears
load reports and cache events.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

from diptych.planning.rates import WorkerRates
from diptych.planning.trace import BLOCK_SIZE
from diptych.planning.workers import DELAY_S, Job
from router.admission import Admission, AdmissionLimits, Priority, Ticket
from router.fleet.worker import CacheChange, KvLayout, Role, WorkerInfo, WorkerLoad
from router.placement.cost import CostSettings, Prompt
from router.placement.placer import Placer

MAX_BACKLOG_S, TIMEOUT_S = 10.0, 600.0
"""The router's defaults."""
MAX_TOKENS = 4096
"""Limit of every output: the router does not know how long it will be."""


class Policy(Protocol):
    """Chooses a prefill and a decode worker for each request."""

    def arrived(self, job: Job, now: float) -> None:
        """A request is there."""
        ...

    def next(self, now: float) -> Job | None:
        """A request that is to be placed now."""
        ...

    def place(self, job: Job, now: float) -> tuple[str, str]:
        """Names of the two workers."""
        ...

    def first_token(self, job: Job, now: float) -> None:
        """The prefill worker is done with it."""
        ...

    def ended(self, job: Job, now: float) -> None:
        """The decode worker is done with it."""
        ...


class Unqueued:
    """Places every request as it comes."""

    def __init__(self) -> None:
        self._arrived: deque[Job] = deque()

    def arrived(self, job: Job, now: float) -> None:
        """See Policy."""
        self._arrived.append(job)

    def next(self, now: float) -> Job | None:
        """See Policy."""
        return self._arrived.popleft() if self._arrived else None


class RoundRobin(Unqueued):
    """Each worker in turn."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        super().__init__()
        self._prefill, self._decode = prefill, decode
        self._turn = -1

    def place(self, job: Job, now: float) -> tuple[str, str]:
        """See Policy."""
        self._turn += 1
        return (
            self._prefill[self._turn % len(self._prefill)],
            self._decode[self._turn % len(self._decode)],
        )

    def first_token(self, job: Job, now: float) -> None:
        """See Policy."""

    def ended(self, job: Job, now: float) -> None:
        """See Policy."""


class LeastLoaded(Unqueued):
    """The prefill worker with the fewest prompt tokens to compute, the emptiest decode worker."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        super().__init__()
        self._tokens = dict.fromkeys(prefill, 0)
        self._requests = dict.fromkeys(prefill, 0)
        self._sequences = dict.fromkeys(decode, 0)

    def place(self, job: Job, now: float) -> tuple[str, str]:
        """See Policy."""
        prefill = self._choose_prefill(job)
        decode = min(self._sequences, key=self._sequences.__getitem__)
        self._tokens[prefill] += job.request.prompt_tokens
        self._requests[prefill] += 1
        self._sequences[decode] += 1
        return prefill, decode

    def _choose_prefill(self, job: Job) -> str:
        return min(self._tokens, key=self._tokens.__getitem__)

    def first_token(self, job: Job, now: float) -> None:
        """See Policy."""
        self._tokens[job.prefill] -= job.request.prompt_tokens
        self._requests[job.prefill] -= 1

    def ended(self, job: Job, now: float) -> None:
        """See Policy."""
        self._sequences[job.decode] -= 1


class ApproximatePrefix(LeastLoaded):
    """The worker that was sent the longest prefix, unless the queues are out of balance.

    It knows what it sent where, not what is cached there. Rules and constants are those that the
    SGLang model gateway documents for its policy cache_aware: by prefix if that is more than 0.3 of
    the prompt, else to the worker that was sent the least; by load alone while the longest queue is
    64 requests and 1.5 times longer than the shortest.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], *, blocks: int) -> None:
        """Remember as many blocks of each worker as its cache holds."""
        super().__init__(prefill, decode)
        self._blocks = blocks
        self._sent: dict[str, OrderedDict[bytes, None]] = {name: OrderedDict() for name in prefill}

    def _choose_prefill(self, job: Job) -> str:
        chosen = self._by_prefix(job)
        sent = self._sent[chosen]
        for block in reversed(job.request.hashes):
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > self._blocks:
            sent.popitem(last=False)
        return chosen

    def _by_prefix(self, job: Job) -> str:
        most, least = max(self._requests.values()), min(self._requests.values())
        if most - least > 64 and most > 1.5 * least:
            return min(self._requests, key=self._requests.__getitem__)
        best, length = "", 0
        for name, sent in self._sent.items():
            matched = 0
            for block in job.request.hashes:
                if block not in sent:
                    break
                matched += 1
            if matched > length:
                best, length = name, matched
        if length * BLOCK_SIZE > 0.3 * job.request.prompt_tokens:
            return best
        return min(self._sent, key=lambda name: (len(self._sent[name]), self._requests[name]))


class Ours:
    """The router's placer, with its index, its prices and its own view, behind its queue."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], rates: WorkerRates) -> None:
        self.placer = Placer(
            CostSettings(
                prefill_tokens_per_s=20_000,
                decode_step_s=0.02,
                transfer_bytes_per_s=rates.link_bytes_per_s,
            )
        )
        size = len(prefill) + len(decode)
        self._admission = Admission(
            AdmissionLimits(max_running=128 * size, max_queued=1 << 20, max_backlog_s=MAX_BACKLOG_S)
        )
        self._jobs: dict[str, Job] = {}
        for role, names in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for name in names:
                self.placer.add(name, _info(name, role, rates))
                snapshot = CacheChange(epoch=1, seq=0, reset=True, stored=(), removed=())
                self.placer.apply(name, snapshot)

    def arrived(self, job: Job, now: float) -> None:
        """See Policy."""
        request = job.request
        ticket = Ticket(
            request_id=str(id(job)),
            key="",
            priority=Priority.NORMAL,
            tokens=request.prompt_tokens + MAX_TOKENS,
            deadline=now + TIMEOUT_S,
        )
        self._jobs[ticket.request_id] = job
        self._admission.offer(ticket, now, self.placer.least_backlog_s(now))

    def next(self, now: float) -> Job | None:
        """See Policy."""
        ticket = self._admission.next(self.placer.least_backlog_s(now))
        return None if ticket is None else self._jobs.pop(ticket.request_id)

    def place(self, job: Job, now: float) -> tuple[str, str]:
        """See Policy."""
        request = job.request
        placement = self.placer.place(
            Prompt(num_tokens=request.prompt_tokens, max_new_tokens=MAX_TOKENS),
            lambda _: request.hashes,
            now,
        )
        assert placement.prefill is not None
        return placement.prefill, placement.worker

    def first_token(self, job: Job, now: float) -> None:
        """See Policy."""

    def ended(self, job: Job, now: float) -> None:
        """See Policy."""
        self.placer.generated(job.request.output_tokens)
        self._admission.leave(str(id(job)), now - job.request.arrives_at)

    def report(self, worker: str, load: WorkerLoad, now: float) -> None:
        """A load report arrived."""
        self.placer.report(worker, load, now + DELAY_S)

    def cache(self, worker: str, change: CacheChange) -> None:
        """A cache event arrived."""
        self.placer.apply(worker, change)


def _info(name: str, role: Role, rates: WorkerRates) -> WorkerInfo:
    return WorkerInfo(
        worker_id=name,
        epoch=1,
        role=role,
        model="simulated",
        model_digest=b"simulated",
        layout=KvLayout(
            num_layers=80,
            num_kv_heads=8,
            head_dim=128,
            block_size=BLOCK_SIZE,
            dtype="bfloat16",
            block_bytes=BLOCK_SIZE * int(rates.kv_bytes_per_token),
        ),
        num_blocks=rates.kv_tokens // BLOCK_SIZE,
        max_model_len=1 << 20,
        max_num_seqs=rates.max_num_seqs,
        vocab_size=128_256,
        eos_token_ids=(),
        kv_address="simulated" if role is Role.PREFILL else "",
    )
