"""The requests that routers have on this worker, and what each router is told about them.

Owned by the engine loop. Invariant: every submission that was accepted gets exactly one Finished,
unless its router took it back or went away.
"""

from collections.abc import Iterator

from core.clock import Clock
from core.errors import DeadlineError, DiptychError
from core.finish import FinishReason
from core.tokens import PromptLogprobs, TokenLogprobs
from engine.request import SequenceOutput, StepOutputs
from kvtransfer.messages import Key
from rpc.token_batch import TokenRow, token_batch
from rpc.v1 import ipc_pb2, worker_pb2
from worker.convert import (
    error_of,
    finish_to_proto,
    logprobs_to_proto,
    prompt_logprobs_to_proto,
)
from worker.ipc import CommandPipe
from worker.role import Submission, engine_id


class Submissions:
    """Live submissions by key, and the way back to their routers; a `worker.role.Outbox`."""

    def __init__(self, pipe: CommandPipe, clock: Clock) -> None:
        self._pipe = pipe
        self._clock = clock
        self._by_key: dict[Key, Submission] = {}
        self._by_engine_id: dict[str, Submission] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Submission]:
        return iter(list(self._by_key.values()))

    def find(self, key: Key) -> Submission | None:
        """The live submission of that name."""
        return self._by_key.get(key)

    def insert(self, submission: Submission) -> None:
        """Take responsibility for a submission."""
        self._by_key[submission.key] = submission
        self._by_engine_id[engine_id(submission.key)] = submission

    def remove(self, key: Key) -> Submission | None:
        """Forget a submission without a word to its router."""
        submission = self._by_key.pop(key, None)
        if submission is not None:
            del self._by_engine_id[engine_id(key)]
        return submission

    def of_channel(self, channel: int) -> list[Submission]:
        """Everything one router has here."""
        return [s for s in self._by_key.values() if s.channel == channel]

    def expired(self, now: float) -> list[Submission]:
        """Submissions past their deadline; the router's own watch normally ends them first."""
        return [s for s in self._by_key.values() if now >= s.deadline]

    def send(self, event: ipc_pb2.EngineEvent) -> None:
        """To the service process."""
        self._pipe.send(event)

    def tell(self, channel: int, message: worker_pb2.WorkerMessage) -> None:
        """To one router, or to every router on channel 0."""
        self._pipe.send(
            ipc_pb2.EngineEvent(worker=ipc_pb2.WorkerFrame(channel=channel, message=message))
        )

    def emit_token(
        self, submission: Submission, token_id: int, logprobs: TokenLogprobs | None
    ) -> None:
        """Tell the router of a token that prefill sampled; it drops the copy it knows already."""
        submission.tokens_told += 1
        row = TokenRow(
            submission.key.request_id,
            submission.key.attempt,
            len(submission.request.output_ids),
            [token_id],
            [logprobs_to_proto(logprobs)] if logprobs else (),
            submission.cached_tokens,
        )
        self.tell(submission.channel, worker_pb2.WorkerMessage(tokens=token_batch([row])))

    def publish(self, outputs: StepOutputs) -> None:
        """Send what a step produced: of prompts, one TokenBatch per router, then the ends."""
        ended_at = self._clock()
        batches: dict[int, list[TokenRow]] = {}
        ends: list[tuple[Submission, FinishReason, SequenceOutput]] = []
        for output in outputs.outputs:
            submission = self._by_engine_id.get(output.request_id)
            if submission is None:
                continue
            _mark(submission, output, began_at=ended_at - outputs.duration_s, ended_at=ended_at)
            if output.prompt_logprobs is not None:
                self._tell_prompt(submission, output.prompt_logprobs)
            if output.token_ids:
                row = _row(submission, output, first=submission.tokens_told == 0)
                submission.tokens_told += len(output.token_ids)
                batches.setdefault(submission.channel, []).append(row)
            if output.finish_reason is not None:
                ends.append((submission, output.finish_reason, output))
        for channel, rows in batches.items():
            self.tell(channel, worker_pb2.WorkerMessage(tokens=token_batch(rows)))
        for submission, reason, output in ends:
            self.finish(submission, reason, matched_stop=output.matched_stop, error=output.error)

    def _tell_prompt(self, submission: Submission, logprobs: PromptLogprobs) -> None:
        key = submission.key
        for part in prompt_logprobs_to_proto(
            logprobs, request_id=key.request_id, attempt=key.attempt
        ):
            self.tell(submission.channel, worker_pb2.WorkerMessage(prompt=part))

    def finish(
        self,
        submission: Submission,
        reason: FinishReason,
        *,
        matched_stop: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Say the last word on a submission and forget it."""
        if self.remove(submission.key) is None:
            return
        message = worker_pb2.Finished(
            request_id=submission.key.request_id,
            attempt=submission.key.attempt,
            reason=finish_to_proto(reason),
            cached_tokens=submission.cached_tokens,
            kv_bytes=submission.kv_bytes,
            times=submission.times,
            matched_stop=matched_stop,
        )
        if error is not None:
            message.error_code, message.error_message = error_of(error)
        self.tell(submission.channel, worker_pb2.WorkerMessage(finished=message))

    def fail(self, key: Key, error: DiptychError) -> None:
        """End a submission with a cause."""
        submission = self._by_key.get(key)
        if submission is not None:
            self.finish(submission, FinishReason.FAILED, error=error)

    def refuse(self, channel: int, submit: worker_pb2.Submit, error: BaseException) -> None:
        """Answer a Submit that never became a submission."""
        code, message = error_of(error)
        finished = worker_pb2.Finished(
            request_id=submit.request_id,
            attempt=submit.attempt,
            reason=worker_pb2.FINISH_REASON_FAILED,
            error_code=code,
            error_message=message,
        )
        self.tell(channel, worker_pb2.WorkerMessage(finished=finished))

    def deadline_error(self, submission: Submission) -> DeadlineError:
        """The cause for one that `expired` returned."""
        waited = self._clock() - submission.submitted_at
        return DeadlineError(f"The request did not finish within its {waited:.1f} s on the worker.")


def _row(submission: Submission, output: SequenceOutput, *, first: bool) -> TokenRow:
    return TokenRow(
        submission.key.request_id,
        submission.key.attempt,
        output.first_index,
        output.token_ids,
        [logprobs_to_proto(entry) for entry in output.logprobs],
        submission.cached_tokens if first else None,
    )


def _mark(
    submission: Submission, output: SequenceOutput, *, began_at: float, ended_at: float
) -> None:
    """Keep the stage times of a submission up to date with a step that worked on it."""
    imported = submission.received_at is not None
    if submission.scheduled_at is None:
        if not imported:
            submission.cached_tokens = output.num_cached_tokens
        submission.scheduled_at = began_at
        if submission.received_at is not None:
            submission.times.decode_queue_s = max(0.0, began_at - submission.received_at)
        else:
            submission.times.queue_s = max(0.0, began_at - submission.submitted_at)
    if output.token_ids and submission.first_token_at is None:
        submission.first_token_at = ended_at
        spent = ended_at - submission.scheduled_at
        if imported:
            submission.times.first_decode_s = spent
        else:
            submission.times.prefill_s = spent
