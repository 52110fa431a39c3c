import shutil
import time
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.modelfile.digest import model_digest
from tests.support.models import make_checkpoint, make_gguf


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_digest_is_of_the_files_not_of_their_place(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path)
    second = Path(shutil.copytree(first, tmp_path / "copy"))
    assert model_digest(first) == model_digest(second)
    assert len(model_digest(first)) == 16


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_digest_changes_with_config_and_with_weights(file: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    before = model_digest(path)
    _flip(path / file, -3)
    assert model_digest(path) != before


def test_digest_of_a_gguf_file_changes_with_it(tmp_path: Path) -> None:
    path = make_gguf(make_checkpoint(tmp_path))
    before = model_digest(path)
    _flip(path, -3)
    assert model_digest(path) != before


def test_digest_of_dummy_weights_needs_only_config_and_seed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    real = model_digest(path)
    (path / "model.safetensors").unlink()
    digests = {real, model_digest(path, dummy_seed=0), model_digest(path, dummy_seed=1)}
    assert len(digests) == 3
    with pytest.raises(ConfigError, match="dummy"):
        model_digest(path)


def test_digest_of_a_large_file_reads_samples_only(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(64 << 30)
    start = time.monotonic()
    model_digest(path)
    assert time.monotonic() - start < 5
