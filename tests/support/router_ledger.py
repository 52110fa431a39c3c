"""A world around one RequestLedger: workers that say what they may, in any order, or vanish.

`events()` lists what can happen next and `apply()` makes it happen, checking every invariant of
the ledger. Explored exhaustively for small worlds and at random for larger ones.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.errors import DeadlineError, ErrorCode
from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs
from router.fleet.worker import LegEnd, Phase
from router.generation import Token
from router.ledger import FRUITFUL_TOKENS, Effects, Leg, RequestLedger, RequestState

PROMPT_LEN = 3
FIRST_TOKEN = 100
P, D = "prefill", "decode"

Event = tuple[object, ...]


def token(index: int) -> Token:
    return Token(index, FIRST_TOKEN + index)


def score(attempt: int, position: int) -> float:
    return -10.0 * attempt - position


@dataclass(slots=True)
class World:
    max_tokens: int
    max_attempts: int
    failures: int = 1
    """How often workers may still fail or vanish."""
    stops: bool = True
    """Whether the client may leave or the deadline pass."""
    scored: bool = False
    """Whether log probabilities of the prompt are wanted."""
    ledger: RequestLedger = field(init=False)
    unsaid: dict[Leg, list[tuple[str, int]]] = field(default_factory=dict)
    """What each leg has yet to say; also of aborted legs, whose last words may be on their way."""
    open: set[Leg] = field(default_factory=set)
    handed: Leg | None = None
    """An export that is complete, as long as decode has said nothing."""
    decoded: Leg | None = None
    """The import that said something last."""
    given: int = 0
    failed: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.ledger = RequestLedger(
            prompt_len=PROMPT_LEN,
            sampling=SamplingParams(
                max_tokens=self.max_tokens, prompt_logprobs=0 if self.scored else None
            ),
            eos_token_ids=(2,),
            max_model_len=1000,
            max_attempts=self.max_attempts,
        )

    def events(self) -> Iterator[Event]:
        if self.ledger.state is RequestState.WAITING:
            yield ("pair", True)
            yield ("pair", False)
            yield ("local",)
        for leg, words in self.unsaid.items():
            if words:
                yield ("say", leg)
        if self.failures:
            for leg in self.open:
                yield ("lose", leg.worker)
                yield ("fail", leg, ErrorCode.KV_TRANSFER)
                yield ("fail", leg, ErrorCode.INVALID_REQUEST)
        if self.stops and not self.stopped:
            yield ("leave",)
            yield ("deadline",)
            yield ("abort",)

    def apply(self, event: Event) -> None:
        was_ended = self.ledger.state is RequestState.ENDED
        before = (self.ledger.end, self.ledger.error)
        match event:
            case ("pair", bool(repeats_first)):
                self._place_pair(repeats_first)
                effects = Effects()
            case ("local",):
                self._place_local()
                effects = Effects()
            case ("say", Leg() as leg):
                effects = self._say(leg)
            case ("lose", str(worker)):
                self._spend_failure()
                self.open = {leg for leg in self.open if leg.worker != worker}
                if worker == P:
                    self.handed = None
                self.unsaid = {k: v for k, v in self.unsaid.items() if k.worker != worker}
                effects = self.ledger.lost(worker, "test")
            case ("fail", Leg() as leg, ErrorCode() as code):
                self._spend_failure()
                self.open.discard(leg)
                del self.unsaid[leg]
                effects = self.ledger.finished(
                    leg.worker, end(leg, FinishReason.FAILED, error_code=code)
                )
            case ("leave",):
                self.stopped = True
                effects = self.ledger.stop()
            case ("abort",):
                self.stopped = True
                effects = self.ledger.abort()
            case _:
                self.stopped = True
                effects = self.ledger.stop(DeadlineError("test"))
        self._check(effects, was_ended)
        if was_ended:
            assert before == (self.ledger.end, self.ledger.error), "a request ends once"

    def _spend_failure(self) -> None:
        self.failures -= 1
        self.failed += 1

    def _place_pair(self, repeats_first: bool) -> None:
        attempt, first = self.ledger.attempt + 1, self.given
        export, imported = Leg(P, attempt, Phase.EXPORT), Leg(D, attempt, Phase.IMPORT)
        ends_at_once = first + 1 == self.max_tokens
        decoded = range(first + (not repeats_first), self.max_tokens)
        self.unsaid[export] = [
            *self._of_prompt(),
            ("token", first),
            ("length" if ends_at_once else "handed_over", 0),
        ]
        self.unsaid[imported] = (
            []
            if ends_at_once
            else [
                *(("token", index) for index in decoded),
                ("length", 0),
            ]
        )
        self.open |= {export, imported}
        self.ledger.place((export, imported), mode="disaggregated")

    def _place_local(self) -> None:
        leg = Leg(D, self.ledger.attempt + 1, Phase.LOCAL)
        self.unsaid[leg] = [
            *self._of_prompt(),
            *(("token", index) for index in range(self.given, self.max_tokens)),
            ("length", 0),
        ]
        self.open.add(leg)
        self.ledger.place((leg,), mode="decode_only")

    def _of_prompt(self) -> list[tuple[str, int]]:
        wanted = self.scored and not self.given
        return [("prompt", position) for position in range(1, PROMPT_LEN)] if wanted else []

    def _say(self, leg: Leg) -> Effects:
        word, index = self.unsaid[leg].pop(0)
        if word == "prompt":
            told = PromptLogprobs(first=index, logprobs=[score(leg.attempt, index)], ranks=[1])
            return self.ledger.prompt(leg.worker, leg.attempt, told)
        if word == "token":
            if leg.phase is Phase.IMPORT and leg in self.open:
                self.handed = None
                self.decoded = leg
            return self.ledger.tokens(leg.worker, leg.attempt, [token(index)])
        del self.unsaid[leg]
        if word == "handed_over" and leg in self.open:
            began = self.decoded is not None and self.decoded.attempt == leg.attempt
            self.handed = None if began else leg
        self.open.discard(leg)
        return self.ledger.finished(leg.worker, end(leg, FinishReason(word)))

    def _check(self, effects: Effects, was_ended: bool) -> None:
        ledger = self.ledger
        if effects.tokens and not self.given:
            self._check_prompt()
        for given in effects.tokens:
            assert given == token(self.given), "tokens come once and in order"
            self.given += 1
        assert ledger.emitted == [FIRST_TOKEN + index for index in range(self.given)]
        for leg in effects.aborts:
            assert leg in self.open or leg == self.handed, "only open legs are aborted, once"
            self.open.discard(leg)
            self.handed = None if leg == self.handed else self.handed
        assert set(ledger.legs) == self.open, "the ledger knows which legs are at work"
        assert ledger.attempt <= 1 + self.failed, "no attempt is wasted"
        assert ledger.fruitless <= self.max_attempts, "a request does not end worker after worker"
        if self.max_tokens < FRUITFUL_TOKENS:
            assert ledger.attempt <= self.max_attempts
        if ledger.error is not None:
            assert self.failed or self.stopped, "an error has a cause"
        if ledger.state is not RequestState.RUNNING:
            assert not self.open and not self.handed, "no leg is left alone"
        if ledger.state is RequestState.RUNNING:
            assert self.open, "somebody works on it"
        if was_ended:
            assert effects == Effects(), "nothing happens after the end"
        if ledger.state is not RequestState.ENDED:
            assert ledger.end is None and ledger.error is None
        if ledger.end is not None:
            assert ledger.error is None
            aborted = ledger.end.finish_reason is FinishReason.ABORTED
            assert self.stopped if aborted else self.given == self.max_tokens, "no token is lost"

    def _check_prompt(self) -> None:
        told, attempt = self.ledger.prompt_logprobs, self.ledger.attempt
        assert (told is not None) == self.scored, "the prompt comes before the first token"
        if told is not None:
            expected = [score(attempt, position) for position in range(1, PROMPT_LEN)]
            assert told.logprobs == expected, "all of one attempt, each position once"

    def check_rest(self) -> None:
        """Nothing can happen any more."""
        assert self.ledger.state is RequestState.ENDED
        assert self.stopped or self.ledger.end is not None or self.ledger.error is not None

    @property
    def key(self) -> str:
        """Equal for worlds with the same future."""
        fields = {name: value for name, value in vars(self.ledger).items() if name != "failure"}
        unsaid = sorted((repr(leg), words) for leg, words in self.unsaid.items())
        return repr((fields, unsaid, self.failures, self.stopped, self.handed))

    def fork(self) -> "World":
        return copy.deepcopy(self)


def end(leg: Leg, reason: FinishReason, **more: object) -> LegEnd:
    return LegEnd(request_id="r", attempt=leg.attempt, reason=reason, **more)  # type: ignore[arg-type]
