import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.modelfile.weight_files import weight_files

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("present", "indexed", "expected"),
    [
        (["model.safetensors"], None, ["model.safetensors"]),
        (["consolidated.safetensors", "model.safetensors"], None, ["model.safetensors"]),
        ([*SHARDS, "consolidated.safetensors"], SHARDS, SHARDS),
        ([*SHARDS, "consolidated-00001-of-00002.safetensors"], None, SHARDS),
        (["b.safetensors", "a.safetensors"], None, ["a.safetensors", "b.safetensors"]),
        (["model.safetensors", SHARDS[0]], SHARDS, ["model.safetensors"]),
    ],
)
def test_weights_are_in_one_file_or_in_those_of_the_index_or_in_all(
    present: list[str], indexed: list[str] | None, expected: list[str], tmp_path: Path
) -> None:
    for name in present:
        (tmp_path / name).touch()
    if indexed is not None:
        write_index(tmp_path, json.dumps({"weight_map": dict(enumerate(indexed * 2))}))
    assert [file.name for file in weight_files(tmp_path)] == expected


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no .*safetensors file. --load-format dummy needs none"),
        (json.dumps({"weight_map": {"a": "x", "b": "y"}}), "lacks x, .* and 1 more; was the down"),
        (json.dumps({"weight_map": {"a": 3}}), "can't be read as an index"),
        (json.dumps({"weight_map": ["x"]}), "can't be read as an index"),
        ("[]", "can't be read as an index"),
        ("{", "can't be read as an index"),
    ],
)
def test_missing_weights_are_told_of(index: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").touch()
    if index is not None:
        write_index(tmp_path, index)
    with pytest.raises(ConfigError, match=message):
        weight_files(tmp_path)


def write_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
