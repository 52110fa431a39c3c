import pytest

from core.errors import DeadlineError, ErrorCode, InvalidRequestError, WorkerLostError
from core.finish import FinishReason
from core.sampling import SamplingParams
from router.fleet.worker import LegEnd, Phase
from router.generation import Token
from router.ledger import FRUITFUL_TOKENS, Leg, RequestLedger, RequestState

EXPORT, IMPORT = Leg("p", 1, Phase.EXPORT), Leg("d", 1, Phase.IMPORT)


def make_ledger(
    max_attempts: int = 4, max_model_len: int = 100, **sampling: object
) -> RequestLedger:
    return RequestLedger(
        prompt_len=10,
        sampling=SamplingParams(**{"max_tokens": 8, **sampling}),  # type: ignore[arg-type]
        eos_token_ids=(2,),
        max_model_len=max_model_len,
        max_attempts=max_attempts,
    )


def paired(**options: object) -> RequestLedger:
    ledger = make_ledger(**options)  # type: ignore[arg-type]
    ledger.place((EXPORT, IMPORT), mode="disaggregated")
    return ledger


def end(reason: FinishReason, attempt: int = 1, **more: object) -> LegEnd:
    return LegEnd(request_id="r", attempt=attempt, reason=reason, **more)  # type: ignore[arg-type]


def run_of(first: int, *token_ids: int) -> list[Token]:
    return [Token(index, token_id) for index, token_id in enumerate(token_ids, first)]


def test_first_token_from_both_legs_is_given_out_once() -> None:
    ledger = paired()
    assert ledger.tokens("p", 1, run_of(0, 50)).tokens == run_of(0, 50)
    assert ledger.tokens("d", 1, run_of(0, 50, 51)).tokens == run_of(1, 51)


def test_token_that_overtakes_the_first_waits_for_it() -> None:
    ledger = paired()
    early = ledger.tokens("d", 1, run_of(1, 51, 52))
    assert early.tokens == () or early.tokens == []
    assert early.failure is None
    assert ledger.finished("d", end(FinishReason.STOP)).failure is None
    assert ledger.state is RequestState.RUNNING
    assert ledger.tokens("p", 1, run_of(0, 50)).tokens == run_of(0, 50, 51, 52)
    assert ledger.end is not None and ledger.end.finish_reason is FinishReason.STOP


def test_gap_that_nobody_can_fill_fails_the_attempt() -> None:
    ledger = paired()
    ledger.tokens("d", 1, run_of(1, 51))
    effects = ledger.finished("p", end(FinishReason.HANDED_OVER))
    assert effects.failure is not None and effects.failure.code is ErrorCode.WORKER_LOST
    assert effects.aborts == (IMPORT,)
    assert ledger.state is RequestState.WAITING


def test_prefill_lost_while_decode_generates_changes_nothing() -> None:
    ledger = paired()
    ledger.tokens("p", 1, run_of(0, 50))
    ledger.tokens("d", 1, run_of(1, 51))
    assert ledger.lost("p", "gone").failure is None
    assert ledger.state is RequestState.RUNNING


def test_prefill_lost_before_decode_began_starts_another_attempt() -> None:
    ledger = paired()
    ledger.tokens("p", 1, run_of(0, 50))
    effects = ledger.lost("p", "gone")
    assert effects.aborts == (IMPORT,)
    assert ledger.state is RequestState.WAITING
    assert ledger.avoid == {"p"}
    assert ledger.emitted == [50]


def test_failed_transfer_blames_the_exporter_whoever_reports_it() -> None:
    ledger = paired()
    ledger.finished("p", end(FinishReason.HANDED_OVER))
    ledger.finished("d", end(FinishReason.FAILED, error_code=ErrorCode.KV_TRANSFER))
    assert ledger.avoid == {"p"}


def test_word_about_an_older_attempt_is_dropped() -> None:
    ledger = paired()
    ledger.lost("p", "gone")
    ledger.place((Leg("d", 2, Phase.LOCAL),), mode="decode_only")
    assert not ledger.tokens("d", 1, run_of(0, 50)).tokens
    assert ledger.finished("d", end(FinishReason.STOP)).aborts == ()
    assert ledger.state is RequestState.RUNNING
    assert ledger.tokens("d", 2, run_of(0, 51)).tokens == run_of(0, 51)


@pytest.mark.parametrize(
    ("sampling", "model_len", "last", "reason", "matched"),
    [
        ({}, 100, 2, FinishReason.STOP, None),
        ({"stop_token_ids": (77,)}, 100, 77, FinishReason.STOP, 77),
        ({"max_tokens": 2}, 100, 50, FinishReason.LENGTH, None),
        ({}, 12, 50, FinishReason.LENGTH, None),
    ],
)
def test_worker_lost_after_the_final_token_is_no_failure(
    sampling: dict[str, object],
    model_len: int,
    last: int,
    reason: FinishReason,
    matched: int | None,
) -> None:
    ledger = make_ledger(max_model_len=model_len, **sampling)
    ledger.place((Leg("d", 1, Phase.LOCAL),), mode="decode_only")
    ledger.tokens("d", 1, run_of(0, 49, last))
    assert ledger.lost("d", "gone").failure is None
    assert ledger.end is not None
    assert (ledger.end.finish_reason, ledger.end.matched_stop) == (reason, matched)


def test_ignored_eos_does_not_end_the_request() -> None:
    ledger = make_ledger(ignore_eos=True)
    ledger.place((Leg("d", 1, Phase.LOCAL),), mode="decode_only")
    ledger.tokens("d", 1, run_of(0, 2))
    assert ledger.lost("d", "gone").failure is not None
    assert ledger.state is RequestState.WAITING


def test_last_attempt_names_its_cause() -> None:
    ledger = make_ledger(max_attempts=1)
    ledger.place((Leg("d", 1, Phase.LOCAL),), mode="decode_only")
    ledger.lost("d", "stream broke")
    assert isinstance(ledger.error, WorkerLostError)
    assert "1 attempt." in ledger.error.message and "stream broke" in ledger.error.message


def lose(ledger: RequestLedger, tokens: int) -> None:
    """One attempt on a worker that brings so many tokens and is lost."""
    attempt = ledger.attempt + 1
    ledger.place((Leg("d", attempt, Phase.LOCAL),), mode="decode_only")
    ledger.tokens("d", attempt, run_of(len(ledger.emitted), *[7] * tokens))
    ledger.lost("d", "gone")


def test_long_output_outlives_any_number_of_workers() -> None:
    ledger = make_ledger(max_attempts=2, max_tokens=900, max_model_len=1000)
    for _ in range(20):
        lose(ledger, FRUITFUL_TOKENS)
    assert ledger.state is RequestState.WAITING and len(ledger.emitted) == 20 * FRUITFUL_TOKENS


def test_request_that_ends_each_worker_at_some_token_is_given_up() -> None:
    ledger = make_ledger(max_attempts=3, max_tokens=900, max_model_len=1000)
    lose(ledger, 200)
    lose(ledger, 1)
    assert ledger.state is RequestState.WAITING
    lose(ledger, 1)
    assert isinstance(ledger.error, WorkerLostError)
    assert "3 attempts in a row." in ledger.error.message


def test_failure_that_no_retry_cures_ends_the_request() -> None:
    ledger = paired()
    failed = end(FinishReason.FAILED, error_code=ErrorCode.CONTEXT_LENGTH, error_message="too long")
    assert ledger.finished("p", failed).aborts == (IMPORT,)
    assert isinstance(ledger.error, InvalidRequestError)
    assert ledger.error.code is ErrorCode.CONTEXT_LENGTH


def test_stop_aborts_both_legs_once() -> None:
    ledger = paired()
    error = DeadlineError("late")
    assert set(ledger.stop(error).aborts) == {EXPORT, IMPORT}
    assert ledger.error is error
    assert ledger.stop().aborts == ()
    assert ledger.error is error


def test_cached_tokens_are_those_of_the_worker_that_computed_the_prompt() -> None:
    ledger = paired()
    ledger.finished("p", end(FinishReason.HANDED_OVER, cached_tokens=4))
    ledger.finished("d", end(FinishReason.STOP, cached_tokens=9))
    assert ledger.end is not None and ledger.end.cached_tokens == 4


def test_cached_tokens_stay_those_of_the_attempt_that_began_the_output() -> None:
    ledger = paired()
    ledger.tokens("p", 1, run_of(0, 50), 0)
    ledger.lost("d", "gone")
    ledger.place((Leg("d", 2, Phase.LOCAL),), mode="decode_only")
    ledger.tokens("d", 2, run_of(1, 51), 9)
    ledger.finished("d", end(FinishReason.STOP, 2, cached_tokens=9))
    assert ledger.end is not None and ledger.end.cached_tokens == 0
