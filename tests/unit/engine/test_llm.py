from pathlib import Path
from typing import Literal, Protocol

import pytest

from core.errors import ConfigError, DiptychError, InvalidRequestError
from core.finish import FinishReason
from core.sampling import SamplingParams
from engine.llm import LLM
from tests.support.engine import make_config
from tests.support.fake_executor import FakeExecutor, undisturbed
from tests.support.models import make_checkpoint

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


class MakeLLM(Protocol):
    def __call__(self, **settings: object) -> tuple[LLM, FakeExecutor]: ...


@pytest.fixture
def make_llm(overlaps: bool) -> MakeLLM:
    """Builds LLMs on executors that overlap, and on others."""

    def make(**settings: object) -> tuple[LLM, FakeExecutor]:
        executor = FakeExecutor(32, 4, overlaps=overlaps)
        return LLM(make_config(**settings), executor=executor), executor

    return make


def test_completions_come_in_the_order_of_prompts(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    prompts = [[9] * 11, [1], [2, 3, 4]]
    completions = llm.generate(prompts, GREEDY)
    assert [list(each.token_ids) for each in completions] == [
        undisturbed(prompt, GREEDY) for prompt in prompts
    ]
    assert {each.finish_reason for each in completions} == {FinishReason.LENGTH}


def test_each_prompt_may_have_its_own_sampling(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    each = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0) for n in (1, 5)]
    completions = llm.generate([[1], [1]], each)
    assert [len(done.token_ids) for done in completions] == [1, 5]
    assert [len(done.logprobs) for done in completions] == [1, 5]
    with pytest.raises(InvalidRequestError, match="2 prompts came with 1"):
        llm.generate([[1], [2]], [GREEDY])


def test_more_prompts_than_the_queue_holds_are_fed_in(make_llm: MakeLLM) -> None:
    llm, _ = make_llm(max_waiting=2)
    completions = llm.generate([[index + 1] for index in range(9)], GREEDY)
    assert len(completions) == 9


def test_second_call_hits_the_cache_and_leaves_nothing_held(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    llm.generate([[5] * 9], GREEDY)
    (again,) = llm.generate([[5] * 9], GREEDY)
    assert again.num_cached_tokens == 8
    assert llm.engine.stats().held_blocks == 0


def test_impossible_prompt_is_refused_before_anything_runs(make_llm: MakeLLM) -> None:
    llm, executor = make_llm()
    with pytest.raises(InvalidRequestError):
        llm.generate([[1], []], GREEDY)
    assert executor.plans == []
    assert not llm.engine.has_work


@pytest.mark.parametrize("fail_at", ["submit", "wait"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_failing_step_is_raised_and_leaves_nothing_behind(
    make_llm: MakeLLM, fail_at: Literal["submit", "wait"], kind: type[BaseException]
) -> None:
    llm, executor = make_llm(max_num_seqs=1)
    llm.generate([[1]], GREEDY)
    executor.fail_with, executor.fail_at = kind("broken"), fail_at
    expected = KeyboardInterrupt if kind is KeyboardInterrupt else DiptychError
    with pytest.raises(expected, match="broken"):
        llm.generate([[1], [2]], GREEDY)
    assert not llm.engine.has_work
    assert llm.engine.stats().held_blocks == 0
    llm.close()


def test_close_closes_the_executor(make_llm: MakeLLM) -> None:
    llm, executor = make_llm()
    llm.close()
    assert executor.closed


def test_it_is_closed_at_the_end_of_its_context_and_only_once(make_llm: MakeLLM) -> None:
    llm, executor = make_llm()
    with llm as same:
        assert same is llm
    assert executor.closed
    executor.closed = False
    llm.close()
    assert not executor.closed
    with pytest.raises(DiptychError, match="closed"):
        llm.generate([[1]], GREEDY)


def test_prompts_that_are_neither_text_nor_ids_are_refused(make_llm: MakeLLM) -> None:
    llm, executor = make_llm()
    with pytest.raises(InvalidRequestError, match="Prompt 0 must be text or a list of token ids"):
        llm.generate([1, 2, 3], GREEDY)  # type: ignore[list-item]
    assert executor.plans == []


def test_text_without_a_tokenizer_is_refused(make_llm: MakeLLM) -> None:
    llm, _ = make_llm(model="nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        llm.generate("text", GREEDY)


def test_wrong_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no setting max_num_seq\. Did you mean max_num_seqs"):
        LLM("demo", max_num_seq=3)
    with pytest.raises(ConfigError, match="block_size came beside an EngineConfig"):
        LLM(make_config(), block_size=16)


def test_text_in_is_text_out_and_ids_are_ids(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    sampling = SamplingParams(max_tokens=8, temperature=0)
    with LLM(str(checkpoint), device="cpu", kv_cache_bytes=1 << 22) as llm:
        ids = llm.tokenizer.encode("The dog sleeps").ids
        by_text, by_ids = llm.generate(["The dog sleeps", ids], sampling)
        assert by_text.token_ids == by_ids.token_ids
        assert by_text.text == llm.tokenizer.decode(list(by_ids.token_ids))
        assert by_ids.text is None
        (alone,) = llm.generate("The dog sleeps", sampling)
        assert alone.text == by_text.text


def test_bar_shows_prompts_and_speed_only_where_asked(
    make_llm: MakeLLM, capfd: pytest.CaptureFixture[str]
) -> None:
    llm, _ = make_llm()
    llm.generate([[1], [2]], GREEDY)
    assert capfd.readouterr() == ("", "")
    llm.generate([[1], [2]], GREEDY, progress=True)
    out, shown = capfd.readouterr()
    assert out == ""
    assert "2/2" in shown and "tokens/s" in shown
