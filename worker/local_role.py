"""The role of a worker whose KV can't leave it or come to it: it computes requests from end to end.

A worker whose model lies on several ranks has it: each rank holds other heads of every block, and a
transport reaches one pool. Routers are told of no transport and of no address to fetch KV from.
"""

import math

from core.errors import UnavailableError
from engine.request import StepOutputs
from rpc.v1 import ipc_pb2, worker_pb2
from worker.role import Submission


class LocalRole:
    """Implements `worker.role.Role`."""

    leases = 0

    def __init__(self, role: worker_pb2.Role) -> None:
        """Args: role is the pool that the worker belongs to."""
        self.role = role

    @property
    def transports(self) -> list[str]:
        """None."""
        return []

    def submit(self, submission: Submission) -> None:
        """Refuse.

        Raises:
            UnavailableError: always.
        """
        raise UnavailableError(
            "The KV of this worker lies on several ranks and can't be handed over; submit with "
            "phase local, or set tensor_parallel_size to 1."
        )

    def abort(self, submission: Submission) -> None:
        """See Role. There is nothing to abort."""

    def receive(self, command: ipc_pb2.EngineCommand) -> None:
        """See Role. Nobody was told of an address to open a link to."""

    def after_step(self, outputs: StepOutputs) -> None:
        """See Role."""

    def turn(self, now: float) -> None:
        """See Role."""

    def wait_s(self, now: float) -> float:
        """See Role. There is nothing to look at."""
        return math.inf

    def report(self, load: worker_pb2.LoadReport) -> None:
        """See Role. There are no links."""

    def observe(self) -> None:
        """See Role."""

    def close(self) -> None:
        """See Role."""
