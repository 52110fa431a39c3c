"""Ranks joined by torch.distributed's backends: gloo on CPUs, NCCL on GPUs.

Backends are made directly, without torch's process-wide default group, so a process may hold
several. How ranks find each other is in meeting.py. On one host nothing listens beyond loopback and
nothing is left on a disk; between hosts, neither torch's store nor its backends ask who calls, so
such a network must be kept to those who may.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from core.errors import ConfigError, WorkerLostError
from engine.parallel.meeting import Meeting

_TORCH: Any = distributed
_C10D: Any = distributed.distributed_c10d
"""Backends and their options; torch's annotations know only some of them."""
_POLL_S = 0.01


def make_store_fd() -> int:
    """A descriptor of an empty rendezvous file, to be inherited by every rank.

    NOTE: never close it. The store opens its path for every access, the last time when torch lets
    go of it, and must not find another file under that number.
    """
    return os.memfd_create("ranks", os.MFD_CLOEXEC)


class TorchGroup:
    """Implements RankGroup."""

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        *,
        meeting: Meeting,
        timeout_s: float,
        check: Callable[[], None],
    ) -> None:
        """Wait for the other ranks and connect.

        Args:
            rank: this one's number.
            size: how many there are.
            device: of this rank.
            meeting: where the others are met.
            timeout_s: longest to wait for another rank while it starts or loads. Also the longest
                that a collective may take: rank 0's watch ends one that stands still much sooner,
                but not while the first steps are compiled, when ranks may be far apart.
            check: called while waiting for other ranks to load; raises when one is lost.

        Raises:
            WorkerLostError: not every rank came.
            ConfigError: ranks are on devices of several kinds.
        """
        self.rank = rank
        self.size = size
        self.calls = 0
        self._timeout_s = timeout_s
        self._check = check
        self._rounds = 0
        self._store: Any = _open_store(meeting, size, timedelta(seconds=timeout_s))
        on_gpu = int(device.type == "cuda")
        if self.smallest(on_gpu) != on_gpu:  # else everyone is here, so connecting is quick
            raise ConfigError(
                f"Rank {rank} is on a GPU and others are not: set device, or show every node its "
                "GPUs."
            )
        store = _C10D.PrefixStore("backend", self._store)
        self._is_nccl = device.type == "cuda"
        make = _nccl if self._is_nccl else _gloo
        self._backend: Any = make(store, self, timedelta(seconds=timeout_s), device, meeting)
        self._reduce_options = _C10D.AllreduceOptions()
        self._gather_options = _C10D.AllgatherOptions()
        # On the current stream, so that nothing waits for an event.
        self._reduce_options.asyncOp = self._gather_options.asyncOp = False

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """See RankGroup."""
        assert tensor.numel(), "a sum of nothing would wait for nobody"
        self.calls += 1
        _wait(self._backend.allreduce([tensor], self._reduce_options))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See RankGroup."""
        self.calls += 1
        rows, part = tensor.shape
        parts = tensor.new_empty(self.size * rows, part)
        _wait(self._backend._allgather_base(parts, tensor.contiguous(), self._gather_options))
        return parts.view(self.size, rows, part).transpose(0, 1).reshape(rows, -1)

    def smallest(self, value: int) -> int:
        """See RankGroup."""
        names = [f"{self._rounds}/{rank}" for rank in range(self.size)]
        self._rounds += 1
        self._store.set(names[self.rank], str(value))
        deadline = time.monotonic() + self._timeout_s
        while not self._store.check(names):
            self._check()
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"Not every rank was ready within {self._timeout_s:.0f} s; see the log for "
                    "what the others did, or raise start_timeout_s."
                )
            time.sleep(_POLL_S)
        return min(int(self._store.get(name)) for name in names)

    def abort(self) -> None:
        """Make collectives under way return, from any thread; gloo's end with their peers."""
        backend = self._backend
        if backend is not None and self._is_nccl:
            backend.abort()

    def close(self) -> None:
        """See RankGroup. Steps have ended: NCCL is left without a word to the other ranks."""
        backend, self._backend, self._store = self._backend, None, None
        if backend is not None:
            (backend.abort if self._is_nccl else backend.shutdown)()


def _wait(work: Any) -> None:
    """NCCL gives nothing to wait for when it runs on the current stream."""
    if work is not None:
        work.wait()


def _open_store(meeting: Meeting, size: int, timeout: timedelta) -> Any:
    if not meeting.several_hosts:
        store = _TORCH.FileStore(f"/proc/self/fd/{meeting.store_fd}", size)
        store.set_timeout(timeout)
        return store
    store = _TORCH.TCPStore(
        meeting.leader_host,
        meeting.port,
        is_master=meeting.listen_fd is not None,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=meeting.listen_fd,
    )
    return _C10D.PrefixStore(meeting.name, store)


def _gloo(
    store: Any, group: TorchGroup, timeout: timedelta, device: torch.device, meeting: Meeting
) -> Any:
    options = _C10D.ProcessGroupGloo._Options()
    options._devices = [_C10D.ProcessGroupGloo.create_device(hostname=meeting.own_host)]
    options._timeout = timeout
    return _C10D.ProcessGroupGloo(store, group.rank, group.size, options)


def _nccl(
    store: Any, group: TorchGroup, timeout: timedelta, device: torch.device, meeting: Meeting
) -> Any:
    if not meeting.several_hosts:
        # Before the first communicator: such ranks meet on no other interface.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(device)
    options = _C10D.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = _C10D.ProcessGroupNCCL(store, group.rank, group.size, options)
    backend.eager_connect_single_device(device)
    return backend
