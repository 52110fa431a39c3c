"""One request's life in the router: which tokens exist, who works on it, how it ends.

Pure Python, no I/O, no clock: dispatch feeds it what happens and sends what it says. States:

    WAITING   not placed: new, or its last attempt failed
    RUNNING   placed on one worker (local) or two (export and import)
    ENDED     exactly once, with `end` or `error`

Invariants: every output index is given out once and in order, whichever leg or attempt it came
from, and none before the log probabilities of the whole prompt are here, if they are wanted; a leg
that has not finished and is not lost is named in exactly one `Effects.aborts`, and so is an export
that nobody took over; nothing happens after ENDED.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from core.errors import (
    RETRYABLE,
    DeadlineError,
    DiptychError,
    ErrorCode,
    InvalidRequestError,
    OverloadedError,
    TransferError,
    UnavailableError,
    WorkerLostError,
)
from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, join_prompt_logprobs
from router.fleet.worker import LegEnd, Phase
from router.generation import GenerationEnd, Token

FRUITFUL_TOKENS = 16
"""A failed attempt that brought this many tokens begins the count towards `max_attempts` anew.

A long output may outlive any number of workers, but a request that ends every worker it comes to
must not: where it does so at a certain token, each further attempt brings one token or two.
Source: own judgement.
"""


class RequestState(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Leg:
    """One worker's part of one attempt."""

    worker: str
    attempt: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed, and whose fault it is."""

    code: ErrorCode
    message: str
    worker: str
    stage: str = ""
    """In which the worker lost it without a word; empty: it did not."""


class Effects(NamedTuple):
    """What the caller must do after an event."""

    tokens: Sequence[Token] = ()
    """For the client, next in order."""
    aborts: Sequence[Leg] = ()
    """Legs whose worker must be told to stop."""
    failure: Failure | None = None
    """Set if the attempt failed: the request now waits, or has ended with an error."""


_NOTHING = Effects()


class RequestLedger:
    """The ledger of one request. Owned by one event loop; never shared."""

    def __init__(
        self,
        *,
        prompt_len: int,
        sampling: SamplingParams,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        max_attempts: int,
    ) -> None:
        """`max_attempts`: fruitless ones in a row after which the request fails."""
        self._prompt_len = prompt_len
        self._sampling = sampling
        self._eos = frozenset(() if sampling.ignore_eos else eos_token_ids)
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._max_tokens = min(sampling.max_tokens, max_model_len - prompt_len)
        self._max_attempts = max_attempts
        self._scores_prompt = sampling.prompt_logprobs is not None

        self.state = RequestState.WAITING
        self.attempt = 0
        """Of the current or latest placement; the first is 1."""
        self.fruitless = 0
        """Failed attempts in a row since one brought FRUITFUL_TOKENS, that one included."""
        self.emitted: list[int] = []
        """Every token id given out so far."""
        self.avoid: set[str] = set()
        """Workers that failed this request; used again only if there is no other."""
        self.failure: Failure | None = None
        """Why the latest attempt failed."""
        self.end: GenerationEnd | None = None
        self.error: DiptychError | None = None

        self._prompt: list[PromptLogprobs] = []
        """Log probabilities of the prompt as far as they are known; all of one attempt."""
        self._mode = ""
        self._began_at = 0
        """Tokens that were there when the latest attempt began."""
        self._open: dict[str, Leg] = {}
        self._early: dict[int, tuple[Token, str]] = {}
        """Tokens above one that another leg still owes, and the worker they came from."""
        self._handed: Leg | None = None
        """The export leg that is complete, until decode is known to have what it exported."""
        self._importing: Leg | None = None
        self._decode_began = False
        self._exporter: str | None = None
        self._cached_tokens: int | None = None
        self._ending: LegEnd | None = None
        """The decode leg's good end, kept while the prefill leg owes an earlier token."""

    def place(self, legs: Iterable[Leg], *, mode: str) -> None:
        """Start the next attempt on `legs`, whose attempt number must be `attempt + 1`.

        Mutates. Only while WAITING.
        """
        assert self.state is RequestState.WAITING
        self.state = RequestState.RUNNING
        self.attempt += 1
        self._mode = mode
        self._open = {leg.worker: leg for leg in legs}
        self._decode_began = False
        self._handed = None
        self._began_at = len(self.emitted)
        if not self.emitted:
            self._prompt.clear()  # a worker of another model may compute this attempt
        by_phase = {leg.phase: leg for leg in self._open.values()}
        self._importing = by_phase.get(Phase.IMPORT)
        self._exporter = by_phase[Phase.EXPORT].worker if Phase.EXPORT in by_phase else None
        assert self._open and all(leg.attempt == self.attempt for leg in self._open.values())

    def tokens(
        self,
        worker: str,
        attempt: int,
        tokens: Sequence[Token],
        cached_tokens: int | None = None,
    ) -> Effects:
        """A worker produced tokens. Late, repeated and unknown ones have no effect."""
        leg = self._open.get(worker)
        if leg is None or leg.attempt != attempt:
            return _NOTHING
        if cached_tokens is not None:
            self._note_cached(leg, cached_tokens)
        if leg is self._importing:
            self._decode_began = True
            self._handed = None
        emitted = self.emitted
        if not (self._early or self._scores_prompt) and tokens and tokens[0].index == len(emitted):
            # Of one leg tokens have no gaps, so these may go out as they are.
            emitted += [token.token_id for token in tokens]
            return Effects(tokens)
        for token in tokens:
            if token.index >= len(emitted):
                self._early.setdefault(token.index, (token, worker))
        return self._go_on()

    def prompt(self, worker: str, attempt: int, logprobs: PromptLogprobs) -> Effects:
        """A worker computed a part of the prompt. Late and unwanted parts have no effect."""
        if self._leg(worker, attempt) is None or logprobs.first != self._next_prompt:
            return _NOTHING
        if logprobs.end > self._prompt_len or not self.wants_prompt_logprobs:
            return _NOTHING
        self._prompt.append(logprobs)
        return self._go_on()

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True if an attempt has to report log probabilities of the prompt."""
        return self._scores_prompt and self._next_prompt < self._prompt_len

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Of the whole prompt, once they are known; None before, and where there are none."""
        if not self._prompt or self._next_prompt < self._prompt_len:
            return None
        if len(self._prompt) > 1:
            self._prompt = [join_prompt_logprobs(self._prompt)]
        return self._prompt[0]

    def _go_on(self) -> Effects:
        given = self._give_out()
        if self._early:
            return self._fail_on_gap()._replace(tokens=given)
        if self._ending is not None:
            return self._end_well(self._ending.reason, self._ending.matched_stop)._replace(
                tokens=given
            )
        return Effects(given)

    def finished(self, worker: str, end: LegEnd) -> Effects:
        """A worker is done with its leg."""
        leg = self._leg(worker, end.attempt)
        if leg is None:
            return _NOTHING
        del self._open[worker]
        match end.reason:
            case FinishReason.STOP | FinishReason.LENGTH:
                self._note_cached(leg, end.cached_tokens)
                if self._early:
                    self._ending = end
                    return self._fail_on_gap()
                return self._end_well(end.reason, end.matched_stop)
            case FinishReason.HANDED_OVER if leg.phase is Phase.EXPORT:
                self._note_cached(leg, end.cached_tokens)
                self._handed = None if self._decode_began else leg
                return self._fail_on_gap()
            case FinishReason.FAILED:
                return self._fail_attempt(Failure(end.error_code, end.error_message, worker))
            case FinishReason.ABORTED:
                message = f"Worker {worker} gave the request up."
                return self._fail_attempt(Failure(ErrorCode.UNAVAILABLE, message, worker))
            case FinishReason.HANDED_OVER:
                message = f"Worker {worker} handed over a request that it was to finish."
                return self._fail_attempt(Failure(ErrorCode.INTERNAL, message, worker))

    def lost(self, worker: str, cause: str) -> Effects:
        """The stream to `worker` ended; whatever it did for this request is gone."""
        if self._handed is not None and self._handed.worker == worker:
            self._handed = None
        leg = self._open.pop(worker, None)
        if leg is None:
            return _NOTHING
        if leg.phase is Phase.EXPORT and self._decode_began and not self._early:
            return _NOTHING
        return self._fail_attempt(
            Failure(ErrorCode.WORKER_LOST, f"Worker {worker} was lost: {cause}.", worker)
        )

    def give_up(self, failure: Failure) -> Effects:
        """End the attempt for a reason that no worker has given. Only while RUNNING."""
        assert self.state is RequestState.RUNNING
        return self._fail_attempt(failure)

    def stop(self, error: DiptychError | None = None) -> Effects:
        """End it now: with `error`, or silently because the client went away."""
        if self.state is RequestState.ENDED:
            return _NOTHING
        self.state = RequestState.ENDED
        self.error = error
        return Effects(aborts=self._close_legs())

    def abort(self) -> Effects:
        """End it now with what it has: somebody other than its client wants no more of it."""
        if self.state is not RequestState.ENDED:
            self.end = self._end_as(FinishReason.ABORTED, None)
        return self.stop()

    @property
    def end_if_left(self) -> GenerationEnd:
        """How it ends for a client that has all it wants now."""
        return self.end or self._end_as(FinishReason.STOP, None)

    @property
    def legs(self) -> Sequence[Leg]:
        """Legs that are still at work."""
        return tuple(self._open.values())

    @property
    def _next_prompt(self) -> int:
        return self._prompt[-1].end if self._prompt else 1

    def _leg(self, worker: str, attempt: int) -> Leg | None:
        leg = self._open.get(worker)
        return leg if leg is not None and leg.attempt == attempt else None

    def _give_out(self) -> list[Token]:
        given: list[Token] = []
        if self.wants_prompt_logprobs:
            return given
        while (entry := self._early.pop(len(self.emitted), None)) is not None:
            given.append(entry[0])
            self.emitted.append(entry[0].token_id)
        return given

    def _fail_on_gap(self) -> Effects:
        """Fail the attempt if a missing token can't come any more.

        A leg reports in order, so only another leg can fill a gap below what a leg reported.
        """
        if not self._early:
            return _NOTHING
        source = next(iter(self._early.values()))[1]
        if any(worker != source for worker in self._open):
            return _NOTHING
        missing = f"Output token {len(self.emitted)}"
        if self.wants_prompt_logprobs:
            missing = f"The log probability of prompt token {self._next_prompt}"
        return self._fail_attempt(
            Failure(ErrorCode.WORKER_LOST, f"{missing} never arrived.", source)
        )

    def _note_cached(self, leg: Leg, cached_tokens: int) -> None:
        if self._began_at and self._cached_tokens is not None:
            return  # what spared work to whoever goes on is nothing to the client
        if leg.phase is not Phase.IMPORT or self._cached_tokens is None:
            self._cached_tokens = min(cached_tokens, self._prompt_len)

    def _end_well(self, reason: FinishReason, matched_stop: int | None) -> Effects:
        self.state = RequestState.ENDED
        self.end = self._end_as(reason, matched_stop)
        return Effects(aborts=self._close_legs())

    def _end_as(self, reason: FinishReason, matched_stop: int | None) -> GenerationEnd:
        return GenerationEnd(
            finish_reason=reason,
            matched_stop=matched_stop,
            cached_tokens=self._cached_tokens or 0,
            mode=self._mode,
        )

    def _fail_attempt(self, failure: Failure) -> Effects:
        self.failure = failure
        # Whichever side of a failed transfer says so, without the exporter there is no transfer:
        # another one is tried, or decode computes the prompt itself.
        transfer = failure.code is ErrorCode.KV_TRANSFER
        self.avoid.add((transfer and self._exporter) or failure.worker)
        aborts = self._close_legs()
        complete = self._already_complete()
        if complete is not None:
            return Effects(aborts=(*aborts, *self._end_well(*complete).aborts))
        brought = len(self.emitted) - self._began_at
        self.fruitless = 1 if brought >= FRUITFUL_TOKENS else self.fruitless + 1
        if failure.code not in RETRYABLE:
            self.error = _as_error(failure.code, failure.message)
        elif self.fruitless >= self._max_attempts:
            attempts = "1 attempt" if self.fruitless == 1 else f"{self.fruitless} attempts in a row"
            message = f"Gave up after {attempts}. {failure.message}"
            self.error = _as_error(failure.code, message)
        self.state = RequestState.WAITING if self.error is None else RequestState.ENDED
        return Effects(aborts=aborts, failure=failure)

    def _already_complete(self) -> tuple[FinishReason, int | None] | None:
        """How the output ended, if only the worker's word for it is missing.

        Without this an attempt after a token that ended the output would generate past it.
        """
        if not self.emitted:
            return None
        last = self.emitted[-1]
        if last in self._eos:
            return FinishReason.STOP, None
        if last in self._stop_ids:
            return FinishReason.STOP, last
        if len(self.emitted) >= self._max_tokens:
            return FinishReason.LENGTH, None
        return None

    def _close_legs(self) -> tuple[Leg, ...]:
        handed = () if self._handed is None else (self._handed,)
        legs = (*self._open.values(), *handed)
        self._handed = None
        self._open.clear()
        self._early.clear()
        self._ending = None
        return legs


def _as_error(code: ErrorCode, message: str) -> DiptychError:
    match code:
        case ErrorCode.WORKER_LOST:
            return WorkerLostError(message)
        case ErrorCode.KV_TRANSFER:
            return TransferError(message)
        case ErrorCode.UNAVAILABLE:
            return UnavailableError(message)
        case ErrorCode.OVERLOADED:
            return OverloadedError(message)
        case ErrorCode.DEADLINE:
            return DeadlineError(message)
        case ErrorCode.INVALID_REQUEST | ErrorCode.CONTEXT_LENGTH:
            return InvalidRequestError(message, code=code)
        case _:
            return DiptychError(message, code=code)
