"""Changes of logits and log probabilities on the device, and that the host never waits."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from core.tokens import TokenLogprobs
from engine.plan import SampleSpec
from engine.sampler.logits import modify_
from engine.sampler.sampler import sample
from tests.support.sampling import AllowedIds, make_spec

pytest.importorskip("triton")
from engine.cuda.sampling import Sampler, draw_plain, plain_arrays
from engine.cuda.sampling_changes import Changes, TokenHistory, apply_, list_changes
from engine.cuda.sampling_copies import send, to_host

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 40
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS: dict[str, list[SampleSpec]] = {
    "repetition": [
        make_spec(repetition_penalty=1.7, prompt=(1, 2, 2, 99), output=(2, 3, -1)),
        make_spec(repetition_penalty=0.5, prompt=(), output=(7,)),
    ],
    "presence": [make_spec(presence_penalty=0.7, prompt=(1,), output=(5, 5, 6))],
    "frequency": [make_spec(frequency_penalty=-0.3, output=(5, 5, 6, 41))],
    "bias": [make_spec(logit_bias={3: 1.5, 39: -100.0, 40: 3.0, -1: 2.0})],
    "masks": [
        make_spec(mask=AllowedIds(VOCAB, 0, 31, 39)),
        make_spec(),
        make_spec(mask=AllowedIds(VOCAB, *range(1, VOCAB))),
    ],
    "bans": [make_spec(banned=(0, 39, 39, 40, -1))],
    "all": [
        make_spec(),
        make_spec(
            repetition_penalty=1.3,
            presence_penalty=0.9,
            frequency_penalty=0.2,
            logit_bias={4: 2.0, 5: -3.0, 6: 9.0},
            prompt=(4, 8),
            output=(4, 5, 5, 9),
            banned=(6, 9),
            mask=AllowedIds(VOCAB, 4, 5, 6, 32, 33),
        ),
        make_spec(presence_penalty=0.1, output=(0,)),
    ],
}


def normal(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed))


def changed(logits: torch.Tensor, specs: list[SampleSpec], history: TokenHistory) -> torch.Tensor:
    result = logits.to(DEVICE, copy=True)
    apply_(result, Changes(*send(list_changes(specs, VOCAB, history), DEVICE)))
    return result.cpu()


def reference(logits: torch.Tensor, specs: list[SampleSpec]) -> torch.Tensor:
    result = logits.clone()
    for row, spec in enumerate(specs):
        modify_(result[row], spec)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_bit_equal_to_the_references(kind: str) -> None:
    specs = KINDS[kind]
    logits = normal(len(specs))
    expected = reference(logits, specs)
    assert not torch.equal(expected, logits)
    assert torch.equal(changed(logits, specs, TokenHistory()), expected)


def test_history_follows_outputs_as_they_grow_and_forgets_those_that_left() -> None:
    history = TokenHistory()
    outputs: list[list[int]] = [[], [3]]
    for step in range(100):
        outputs[0].append(step % 37)
        outputs[1].extend((step % 3, 39, 77))
        specs = [
            make_spec(
                frequency_penalty=0.1, repetition_penalty=1.1, output=output, prompt=outputs[0]
            )
            for output in outputs[: 1 if step == 50 else 2]
        ]
        logits = normal(len(specs), seed=step)
        assert torch.equal(changed(logits, specs, history), reference(logits, specs))
    history.end_step()
    history.end_step()
    assert not history._known and not history._used


def test_history_counts_anew_when_a_list_became_shorter() -> None:
    history = TokenHistory()
    output = [1, 2, 3]
    specs = [make_spec(presence_penalty=1.0, output=output)]
    changed(normal(1), specs, history)
    output[:] = [5]
    assert torch.equal(changed(normal(1), specs, history), reference(normal(1), specs))


def test_history_tells_lists_of_equal_content_apart() -> None:
    history = TokenHistory()
    first, second = [1], [1]
    for _ in range(2):
        specs = [make_spec(frequency_penalty=1.0, output=first)]
        specs.append(make_spec(frequency_penalty=1.0, output=second))
        assert torch.equal(changed(normal(2), specs, history), reference(normal(2), specs))
        second.append(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_unmodified_logits_and_the_token_drawn(dtype: torch.dtype) -> None:
    logits = normal(5).to(dtype)
    specs = [
        make_spec(0, logprobs=3),
        make_spec(1, seed=4),
        make_spec(2, logprobs=0, temperature=0, logit_bias={7: 90.0}),
        make_spec(3, logprobs=20, top_k=2, repetition_penalty=2.0, prompt=(1, 2, 3)),
        make_spec(4, temperature=0),
    ]
    out, logprobs = drawn(logits, specs)
    expected = sample(logits.clone(), specs)
    assert out == [result.token_id for result in expected]
    assert out[2] == 7
    assert list(logprobs) == [0, 2, 3]
    for row, got in logprobs.items():
        want = expected[row].logprobs
        assert want is not None
        assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
        assert [score for _, score in got.top] == pytest.approx(
            [score for _, score in want.top], abs=1e-5
        )
        scores = torch.log_softmax(logits[row].float(), -1)
        assert all(score == pytest.approx(scores[i].item(), abs=1e-5) for i, score in got.top)
        assert len({i for i, _ in got.top}) == specs[row].params.logprobs


def test_logprobs_of_more_rows_than_are_taken_at_once_and_more_tokens_than_there_are() -> None:
    logits = normal(70)[:, :3]
    specs = [make_spec(i, temperature=0, logprobs=5) for i in range(70)]
    _, logprobs = drawn(logits, specs)
    scores = torch.log_softmax(logits, -1)
    for row in range(70):
        assert len(logprobs[row].top) == 3
        assert logprobs[row].logprob == pytest.approx(scores[row].max().item(), abs=1e-5)
        assert logprobs[row].top[0][0] == int(logits[row].argmax())


def drawn(
    logits: torch.Tensor, specs: list[SampleSpec]
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    logits = logits.to(DEVICE)
    out = torch.empty(len(specs), dtype=torch.int32, device=DEVICE)
    draw_plain(logits, *send(plain_arrays(specs), DEVICE), out)
    logprobs = Sampler().draw(logits, specs, out)
    on_host = logprobs.to_host() if logprobs is not None else None
    ids = to_host(out)
    if DEVICE.type == "cuda":
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
    return ids.tolist(), on_host.results() if on_host is not None else {}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


def every_kind(rows: int, vocab_size: int) -> list[SampleSpec]:
    mask = AllowedIds(vocab_size, 4, vocab_size - 1)
    specs = [
        spec if spec.mask is None else replace(spec, mask=mask)
        for kind in KINDS.values()
        for spec in kind
    ]
    specs += [make_spec(top_k=3, logprobs=2), make_spec(top_p=0.9), make_spec(min_p=0.1)]
    return [specs[i % len(specs)] for i in range(rows)]


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [3000, 151_936])
def test_the_host_never_waits(vocab_size: int, no_waiting: None) -> None:
    specs = every_kind(24, vocab_size)
    logits = torch.randn(24, vocab_size, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(24, dtype=torch.int32, device=DEVICE)
    sampler = Sampler()
    for _ in range(2):
        draw_plain(logits, *send(plain_arrays(specs), DEVICE), out)
        logprobs = sampler.draw(logits, specs, out)
        assert logprobs is not None
        logprobs.to_host()
        to_host(out)


@gpu
@pytest.mark.gpu
def test_a_graph_of_the_plain_draw_gives_the_eager_tokens() -> None:
    specs = [make_spec(i, seed=i, temperature=i % 3 / 2) for i in range(24)]
    shape = (24, 151_936)
    logits = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    arrays = send(plain_arrays(specs), DEVICE)
    out, eager = (torch.empty(24, dtype=torch.int32, device=DEVICE) for _ in range(2))
    draw_plain(logits, *arrays, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw_plain(logits, *arrays, out)
    for _ in range(3):
        logits.copy_(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16))
        graph.replay()
        draw_plain(logits, *arrays, eager)
        assert torch.equal(out, eager)
