"""The process that a leader asks Ray through: has its other nodes placed and started, and watches.

A process of its own, since Ray takes signals, threads and exits of the process that it is in as its
own, and connects for as long as it likes: the leader ends this one when it has waited enough. Reads
an order from standard input, writes reports to standard output, one JSON object a line each.
Invariant: ends when standard input does, and with it all that Ray placed.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from worker.exit_status import EXIT_NODE_LOST, EXIT_REFUSED
from worker.ray_node import NodeActor

_TURN_S = 0.25
_PARTING_S = 5.0
"""What nodes get to end by themselves once the leader has."""
_PIN = 0.001
"""Of the resource that Ray gives each host in its own name."""
_WILDCARDS = ("0.0.0.0", "::", "[::]")


class RefusedError(Exception):
    """The nodes can't be placed; `status` is what the worker ends with."""

    def __init__(self, message: str, status: int = EXIT_REFUSED) -> None:
        super().__init__(message)
        self.status = status


def bundle_of(values: Mapping[str, Any]) -> dict[str, float]:
    """What Ray is asked for on each host."""
    device, ranks = values["device"], values["tensor_parallel_size"] // values["nodes"]
    if device == "auto":
        from engine.devices import usable_device  # torch, which takes seconds

        device = usable_device(device)
    bundle: dict[str, float] = {"CPU": values["num_threads"] or ranks}
    return bundle | ({"GPU": ranks} if device == "cuda" else {})


def node_values(order: Mapping[str, Any], rank: int, host: str) -> dict[str, Any]:
    """Settings of the node that Ray placed at `host`."""
    values = order["values"]
    here = order["loopback"] and not _is_loopback(host)
    own_host = order["own_host"] if here else host
    return {
        **values,
        "placement": "manual",
        "node_rank": rank,
        "leader_address": order["leader_address"],
        "host": values["host"] if values["host"] in _WILDCARDS else own_host,
        "advertise_host": own_host,
        "port": 0,
        "metrics_port": 0 if values["ray_strategy"] == "pack" else values["metrics_port"],
        "worker_id": None,
    }


def tell(reports: int, **fields: object) -> None:
    """Report to the leader, if it is still there to hear."""
    with suppress(BrokenPipeError):
        os.write(reports, json.dumps(fields).encode() + b"\n")


class Driver:
    """Ray, and what this process had it do."""

    def __init__(self, ray: Any, order: Mapping[str, Any], reports: int) -> None:
        """Args: ray is the package; reports is where to tell."""
        self._ray = ray
        self._order = order
        self._values: Mapping[str, Any] = order["values"]
        self._reports = reports
        self._told_to_end = threading.Event()
        self._group: Any = None

    def _await_end(self) -> None:
        sys.stdin.read()
        self._told_to_end.set()

    def run(self) -> None:
        """Place, start and watch until told to end.

        Raises:
            RefusedError: Ray can't or won't.
        """
        ray, order = self._ray, self._order
        threading.Thread(target=self._await_end, daemon=True).start()
        try:
            ray.init(
                address=self._values["ray_address"], log_to_driver=False, configure_logging=False
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise RefusedError(
                f"There is no Ray at {self._values['ray_address']} to place nodes with, or it does "
                f"not take this host: {_brief(error)} This host must run `ray start`."
            ) from None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the leader ends this process, after its nodes
        actors = self._place()
        if not actors:
            return
        try:
            hosts = ray.get([actor.host.remote() for actor in actors], timeout=self._left_s())
        except ray.exceptions.RayError as error:
            raise RefusedError(f"Ray could not start the other nodes: {_brief(error)}") from None
        self.check(hosts)
        runs = {
            actor.run.remote(
                order["role"],
                json.dumps(node_values(order, rank, host)).encode(),
                order["folder"],
            ): (rank, host)
            for rank, (actor, (host, _)) in enumerate(zip(actors, hosts, strict=True))
            if rank > 0
        }
        tell(self._reports, placed=dict(runs.values()))
        self._watch(runs)

    def _place(self) -> list[Any]:
        """An actor in each bundle, the leader's first; none if told to end."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        values = self._values
        bundle = bundle_of(values)
        here = {**bundle, f"node:{self._ray.util.get_node_ip_address()}": _PIN}
        strategy = values["ray_strategy"].upper()
        group = placement_group([here, *[bundle] * (values["nodes"] - 1)], strategy=strategy)
        self._group = group
        while not group.wait(_TURN_S):
            if self._told_to_end.is_set():
                return []
            if not self._left_s():
                raise RefusedError(self._no_room(bundle), EXIT_NODE_LOST)
        actor = self._ray.remote(NodeActor)
        return [
            actor.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            ).remote()
            for index in range(values["nodes"])
        ]

    def _left_s(self) -> float:
        return max(0.0, float(self._order["deadline"]) - time.monotonic())

    def _no_room(self, bundle: Mapping[str, float]) -> str:
        values = self._values
        spread = (
            "as near as can be" if values["ray_strategy"] == "pack" else "each on a host of its own"
        )
        free = self._ray.available_resources()
        hosts = [
            f"{node['NodeManagerAddress']}: {_amounts(node['Resources'])}"
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        return (
            f"Ray has no room for this worker: {values['nodes']} nodes were asked for, {spread}, "
            f"one of them here, with {_amounts(bundle)} each; Ray has {'; '.join(hosts)}; free of "
            f"all: {_amounts(free)}."
        )

    def check(self, hosts: list[tuple[str, list[str]]]) -> None:
        """See that the nodes can work where Ray put them.

        Args:
            hosts: address of each node's host and the GPUs of its bundle, the leader's first.

        Raises:
            RefusedError: says what to set.
        """
        (here, gpus), *others = hosts
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        ours = visible.split(",") if visible else [str(index) for index in range(len(gpus))]
        if sorted(gpus) != sorted(ours[: len(gpus)]):
            raise RefusedError(
                f"Ray keeps GPUs {','.join(gpus)} of this host for the leader, which would take "
                f"others: start it with CUDA_VISIBLE_DEVICES={','.join(gpus)}."
            )
        if self._order["loopback"]:
            away = [host for host, _ in others if host != here and not _is_loopback(host)]
            if away:
                raise RefusedError(
                    f"Nodes at {', '.join(away)} can't connect to a leader on loopback: set host "
                    "or advertise_host to an address of this host."
                )

    def _watch(self, runs: dict[Any, tuple[int, str]]) -> None:
        give_up_at = None
        while runs:
            if give_up_at is None and self._told_to_end.is_set():
                give_up_at = time.monotonic() + _PARTING_S
            if give_up_at is not None and time.monotonic() > give_up_at:
                return
            for ref in self._ray.wait(list(runs), timeout=_TURN_S)[0]:
                rank, host = runs.pop(ref)
                try:
                    status, log = self._ray.get(ref)
                    reason = f"it ended with status {status}" if status else ""
                except self._ray.exceptions.RayError as error:
                    reason, log = f"Ray lost its actor ({_brief(error)})", ""
                if reason:
                    tell(self._reports, lost=f"Node {rank} ({host}) was lost: {reason}.", log=log)
        self._told_to_end.wait()

    def close(self) -> None:
        """Give back what Ray gave, which ends whatever still runs in it."""
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        self._ray.shutdown()


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main() -> None:
    """Carry out one order."""
    reports = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed here is no report
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(sys.stdin.readline())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        missing = "placement is ray, but Ray is not installed: pip install 'diptych[worker,ray]'."
        tell(reports, refused=missing, status=EXIT_REFUSED)
        return
    driver = Driver(ray, order, reports)
    try:
        driver.run()
    except RefusedError as error:
        tell(reports, refused=str(error), status=error.status)
    finally:
        driver.close()


if __name__ == "__main__":
    main()
