"""The engine loop: the one thread that owns engine, KV pool and hand-overs of a worker.

One turn: take the commands that have arrived, let the role look at its transfers, run one step,
tell the routers. A turn never waits for a peer; it sleeps only when there is nothing to compute.
"""

import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from core.block_hash import pack_hashes
from core.clock import Clock
from core.errors import DiptychError, InvalidRequestError, UnavailableError
from engine.engine import Engine
from engine.executor import ExecutorLostError
from engine.metrics import EngineMetrics
from kvtransfer.messages import Key
from rpc.v1 import ipc_pb2, worker_pb2
from telemetry.metrics import exposition
from worker.convert import load_to_proto, lower_tiers_to_proto, request_from_proto
from worker.ipc import CommandPipe
from worker.role import Outbox, Role, Submission, engine_id
from worker.submissions import Submissions

log = logging.getLogger(__name__)

_DEADLINE_SCAN_S = 0.5
_METRICS_INTERVAL_S = 1.0
_GRAMMAR_POLL_S = 0.002
"""Nothing wakes the loop when a grammar is compiled, which takes about that long."""


class EngineLoop:
    """Turns until told to stop."""

    def __init__(
        self,
        *,
        engine: Engine,
        build_role: Callable[[Outbox], Role],
        pipe: CommandPipe,
        description: worker_pb2.WorkerDescription,
        heartbeat_interval_s: float,
        clock: Clock,
        metrics: EngineMetrics,
        registry: CollectorRegistry,
    ) -> None:
        self._engine = engine
        self._pipe = pipe
        self._clock = clock
        self._heartbeat_interval_s = heartbeat_interval_s
        self._metrics = metrics
        self._registry = registry
        self._submissions = Submissions(pipe, clock)
        self._role: Role = build_role(self._submissions)
        self._description = description
        self._description.role = self._role.role
        self._description.transports.extend(self._role.transports)
        self._cache_seq = 0
        self._draining = False
        self._drains: list[tuple[int, float]] = []
        self._next_heartbeat = 0.0
        self._next_deadline_scan = 0.0
        self._next_metrics = 0.0
        self._stopping = False

    def run(self) -> None:
        """Run until Stop.

        Raises:
            PipeClosedError: the service process went away.
            ExecutorLostError: no further step can be computed.
        """
        self._pipe.send(ipc_pb2.EngineEvent(ready=ipc_pb2.Ready(worker=self._description)))
        try:
            while not self._stopping:
                self.turn()
            self._hand_back()
        finally:
            self._role.close()

    def turn(self) -> None:
        """One round of the loop."""
        for command in self._pipe.receive(self._idle_s()):
            self._obey(command)
        self._role.turn(self._clock())
        if self._engine.has_work:
            outputs = self._engine.step()
            self._role.after_step(outputs)
            self._submissions.publish(outputs)
            for output in outputs.outputs:
                if isinstance(output.error, ExecutorLostError):
                    raise output.error  # its requests were told; others would fare no better
        else:
            self._engine.tend()
        self._publish_cache_changes()
        self._keep_time()

    def _idle_s(self) -> float:
        if self._engine.has_work:
            return 0.0
        now = self._clock()
        wait_s = min(self._next_heartbeat - now, self._role.wait_s(now))
        if self._engine.waits_for_grammar:
            wait_s = min(wait_s, _GRAMMAR_POLL_S)
        return max(0.0, wait_s)

    def _obey(self, command: ipc_pb2.EngineCommand) -> None:
        match command.WhichOneof("body"):
            case "router":
                self._from_router(command.router.channel, command.router.message)
            case "closed":
                self._close(command.closed.channel, command.closed.reason)
                self._role.receive(command)
            case "decode" | "prefill":
                self._role.receive(command)
            case "call":
                self._call(command.call)
            case "stop":
                self._stopping = True
            case other:
                log.warning("ignored a command of unknown kind %s", other)

    def _from_router(self, channel: int, message: worker_pb2.RouterMessage) -> None:
        match message.WhichOneof("body"):
            case "hello":
                hello = worker_pb2.WorkerMessage(hello=self._description)
                self._submissions.tell(channel, hello)
                self._snapshot(channel)
            case "submit":
                self._submit(channel, message.submit)
            case "abort":
                key = Key(message.abort.request_id, message.abort.attempt)
                submission = self._submissions.find(key)
                if submission is None:
                    self._role.withdraw(key, channel)
                elif submission.channel == channel:
                    self._abort(submission)
            case "resync":
                self._snapshot(channel)
            case other:
                log.warning("ignored a router message of unknown kind %s", other)

    def _submit(self, channel: int, submit: worker_pb2.Submit) -> None:
        key = Key(submit.request_id, submit.attempt)
        now = self._clock()
        try:
            if self._draining:
                raise UnavailableError("The worker is draining and takes no new requests.")
            if self._submissions.find(key) is not None:
                raise InvalidRequestError(f"Request {key.request_id} is here already.")
            submission = Submission(
                key=key,
                channel=channel,
                request=request_from_proto(
                    submit,
                    engine_id=engine_id(key),
                    vocab_size=self._description.vocab_size,
                    block_size=self._description.layout.block_size,
                ),
                deadline=now + submit.deadline_ms / 1000,
                submitted_at=now,
                submit=submit,
            )
            self._accept(submission)
        except DiptychError as error:
            self._submissions.refuse(channel, submit, error)

    def _accept(self, submission: Submission) -> None:
        self._submissions.insert(submission)
        try:
            match submission.submit.WhichOneof("phase"):
                case "local":
                    self._engine.add(submission.request)
                case None:
                    raise InvalidRequestError("The submission names no phase.")
                case _:
                    self._role.submit(submission)
        except DiptychError:
            self._submissions.remove(submission.key)
            raise

    def _abort(self, submission: Submission) -> None:
        self._release(submission)
        self._submissions.remove(submission.key)

    def _release(self, submission: Submission) -> None:
        self._engine.abort(engine_id(submission.key))
        if submission.submit.WhichOneof("phase") != "local":
            self._role.abort(submission)

    def _close(self, channel: int, reason: str) -> None:
        gone = self._submissions.of_channel(channel)
        if gone:
            log.warning("router left with %d requests here (%s): aborting them", len(gone), reason)
        for submission in gone:
            self._abort(submission)

    def _hand_back(self) -> None:
        """Let routers take what still runs here elsewhere now, not when their streams break."""
        left = list(self._submissions)
        if left:
            log.warning("ending with %d requests here: handing them back", len(left))
        for submission in left:
            self._release(submission)
            self._submissions.fail(submission.key, UnavailableError("The worker is ending."))

    def _call(self, call: ipc_pb2.AdminCall) -> None:
        match call.WhichOneof("verb"):
            case "flush_cache":
                freed = self._engine.flush_cache()
                reply = worker_pb2.FlushCacheResponse(freed_blocks=freed)
                self._reply(ipc_pb2.AdminReply(id=call.id, flush_cache=reply))
            case "drain":
                self._draining = not call.drain.resume
                timeout_s = 0.0 if call.drain.resume else call.drain.timeout_ms / 1000
                self._drains.append((call.id, self._clock() + timeout_s))
            case other:
                log.warning("ignored an admin call of unknown kind %s", other)

    def _reply(self, reply: ipc_pb2.AdminReply) -> None:
        self._pipe.send(ipc_pb2.EngineEvent(reply=reply))

    def _answer_drains(self, now: float) -> None:
        idle = not self._submissions and not self._role.leases
        waiting = []
        for call_id, give_up_at in self._drains:
            if not idle and now < give_up_at:
                waiting.append((call_id, give_up_at))
                continue
            response = worker_pb2.DrainResponse(
                drained=idle and self._draining,
                running=len(self._submissions),
                leases=self._role.leases,
            )
            self._reply(ipc_pb2.AdminReply(id=call_id, drain=response))
        self._drains = waiting

    def _snapshot(self, channel: int) -> None:
        """Bring one router up to the last event that was sent."""
        self._publish_cache_changes()
        snapshot = worker_pb2.CacheEvents(
            epoch=self._description.epoch,
            seq=self._cache_seq,
            reset=True,
            stored=pack_hashes(self._engine.cached_hashes()),
            lower=lower_tiers_to_proto(self._engine.host_hashes()),
        )
        self._submissions.tell(channel, worker_pb2.WorkerMessage(cache=snapshot))

    def _publish_cache_changes(self) -> None:
        change = self._engine.drain_cache_changes()
        if not any((change.stored, change.removed, change.host_stored, change.host_removed)):
            return
        self._cache_seq += 1
        events = worker_pb2.CacheEvents(
            epoch=self._description.epoch,
            seq=self._cache_seq,
            stored=pack_hashes(change.stored),
            removed=pack_hashes(change.removed),
            lower=lower_tiers_to_proto(change.host_stored, change.host_removed),
        )
        self._submissions.tell(0, worker_pb2.WorkerMessage(cache=events))

    def _keep_time(self) -> None:
        now = self._clock()
        if self._drains:
            self._answer_drains(now)
        if now >= self._next_deadline_scan:
            self._next_deadline_scan = now + _DEADLINE_SCAN_S
            for submission in self._submissions.expired(now):
                self._release(submission)
                self._submissions.fail(submission.key, self._submissions.deadline_error(submission))
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self._heartbeat_interval_s
            self._beat(now)

    def _beat(self, now: float) -> None:
        stats = self._engine.stats()
        metrics = b""
        if now >= self._next_metrics:
            self._next_metrics = now + _METRICS_INTERVAL_S
            self._metrics.observe_stats(stats)
            self._role.observe()
            metrics = exposition(self._registry)
        load = load_to_proto(stats, draining=self._draining, leases=self._role.leases)
        self._role.report(load)
        self._pipe.send(
            ipc_pb2.EngineEvent(heartbeat=ipc_pb2.Heartbeat(load=load, metrics=metrics))
        )
