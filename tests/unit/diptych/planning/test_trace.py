"""Public forms of traces are read; what is in neither form is refused by its place."""

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from diptych.planning.block_cache import hits_of_one_cache
from diptych.planning.trace import BLOCK_SIZE, faster, made_up, read_trace


def test_mooncake_and_azure_give_the_same_kind_of_requests(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 9]},
        {"timestamp": 1000, "input_length": 1024, "output_length": 7, "hash_ids": [1, 2]},
    ]
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text("\n".join(map(json.dumps, rows)) + "\n")
    requests = read_trace(mooncake)
    assert [each.arrives_at for each in requests] == [0, 2]
    assert [each.prompt_tokens for each in requests] == [1024, 1100]
    assert hits_of_one_cache(requests, None) == [0, 2 * BLOCK_SIZE]

    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:16:46.1805900,0,109\n"
    )
    first, second = read_trace(azure)
    assert (first.prompt_tokens, first.output_tokens, first.hashes) == (374, 44, ())
    assert second.arrives_at == pytest.approx(59.5)
    assert second.prompt_tokens == 1, "an empty prompt is no request"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "holds no requests"),
        ('{"timestamp": 0, "input_length": 4}\n', "request 1"),
        ("a,b\n1,2\n", "request 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,7,8\nlater,7,8\n", "2 is"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_trace(path)
    with pytest.raises(ConfigError, match="can't be read"):
        read_trace(tmp_path / "absent")


def test_made_up_load_has_the_means_that_were_asked_for() -> None:
    requests = made_up(rate=5, prompt_tokens=900, output_tokens=120, spread=1.0, count=20_000)
    mean = sum(each.prompt_tokens for each in requests) / len(requests)
    assert mean == pytest.approx(900, rel=0.05)
    assert len(requests) / requests[-1].arrives_at == pytest.approx(5, rel=0.05)
    assert faster(requests, 2)[-1].arrives_at == requests[-1].arrives_at / 2
