"""The executor of several ranks: this process is rank 0, the others are its children or elsewhere.

Every rank gets every plan, computes its share and gathers the same logits, so each samples the same
tokens and nothing is sent back but failures. Invariant: when rank 0 knows a step's result, every
rank has read and written all KV of that step, since the last layer's sums need each rank's
attention. So blocks may be handed over, or filled from elsewhere, as with one rank.
"""

import atexit

from engine.executor import Executor, OtherRanks, PendingStep
from engine.kv.pool import KVPool
from engine.models.config import ModelConfig
from engine.parallel.children import RankProcesses
from engine.parallel.group import RankGroup
from engine.parallel.host_memory import RankedHostMemory
from engine.parallel.pipe import Frame
from engine.parallel.plan_codec import PlanEncoder, read_masks
from engine.plan import StepPlan, StepResult


class MultiProcessExecutor:
    """Implements Executor. Any failed step is final: it then raises the same error for ever."""

    def __init__(self, local: Executor, group: RankGroup, ranks: RankProcesses) -> None:
        """Join the parts; `start_ranks` makes them.

        Args:
            local: executor of rank 0, in this process.
            group: of rank 0.
            ranks: the others, ready for steps.
        """
        self._local = local
        self._group = group
        self._ranks = ranks
        self._encoder = PlanEncoder()
        own = local.pool.host_memory
        if own is not None:
            local.pool.host_memory = RankedHostMemory(own, ranks, group.size)
        self._closed = False
        # Children end with this process in any case; this lets both end in order.
        atexit.register(self.close)

    @property
    def model_config(self) -> ModelConfig:
        """See Executor."""
        return self._local.model_config

    @property
    def model_digest(self) -> bytes:
        """See Executor."""
        return self._local.model_digest

    @property
    def pool(self) -> KVPool:
        """See Executor. Rank 0's; the others hold the same blocks of the other heads."""
        return self._local.pool

    @property
    def ranks(self) -> OtherRanks:
        """See Executor."""
        return self._ranks.side

    @property
    def overlaps(self) -> bool:
        """See Executor."""
        return self._local.overlaps

    @property
    def pids(self) -> list[int]:
        """Process ids of the other ranks on this host."""
        return self._ranks.pids

    def submit(self, plan: StepPlan) -> PendingStep:
        """See Executor.

        Raises:
            ExecutorLostError: a rank is lost; it is raised for every further step too.
        """
        assert not self._closed, "submit after close"
        # Reading a mask may wait for the step before, whose failure is that step's own.
        read_masks(plan)
        with self._ranks.step():
            self._ranks.send(Frame.PLAN, self._encoder.encode(plan))
            return _RankedStep(self._local.submit(plan), self._ranks)

    def close(self) -> None:
        """See Executor. Ends the other ranks' processes."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        # Leaving the group may need all of its ranks.
        self._ranks.begin_close()
        self._local.close()
        self._group.close()
        self._ranks.close()


class _RankedStep:
    """A PendingStep that fails when a rank is lost."""

    __slots__ = ("_ranks", "_step")

    def __init__(self, step: PendingStep, ranks: RankProcesses) -> None:
        self._step = step
        self._ranks = ranks

    def wait(self) -> StepResult:
        """See PendingStep."""
        with self._ranks.step():
            return self._step.wait()
