from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.errors import ConfigError
from core.modelfile.convert import convert_gguf
from core.modelfile.description import read_config, read_eos_token_ids, read_tokenizer
from core.modelfile.gguf_file import GgufFile
from core.modelfile.resolve import silent
from tests.support.models import CHAT_TEMPLATE, make_checkpoint, make_gguf

TEXTS = ["The dog sleeps, then 12 more.", "Der Fluß\n\n  fließt", "<|im_start|>user\nä😀<|im_end|>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=5)


@pytest.fixture(scope="module")
def gguf(checkpoint: Path) -> Path:
    return make_gguf(checkpoint)


def test_weights_are_those_of_the_checkpoint_it_was_made_from(checkpoint: Path, gguf: Path) -> None:
    expected = load_file(checkpoint / "model.safetensors")
    found = dict(GgufFile(gguf).weights())
    assert set(found) == set(expected)
    for name, values in found.items():
        assert np.array_equal(values, expected[name].numpy()), name


def test_description_equals_the_folders(checkpoint: Path, gguf: Path) -> None:
    config, expected = read_config(gguf), read_config(checkpoint)
    assert {k: config[k] for k in expected} == expected
    assert read_eos_token_ids(gguf) == read_eos_token_ids(checkpoint) == (2,)
    ours, theirs = read_tokenizer(gguf), read_tokenizer(checkpoint)
    assert ours.chat_template == theirs.chat_template == CHAT_TEMPLATE
    assert ours.special_tokens == theirs.special_tokens
    for text in TEXTS:
        ids = ours.tokenizer.encode(text).ids
        assert ids == theirs.tokenizer.encode(text).ids
        assert ours.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_converted_folder_loads_in_transformers_with_the_same_weights(
    checkpoint: Path, gguf: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert_gguf(gguf, tmp_path, silent)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = load_file(checkpoint / "model.safetensors")
    state: dict[str, Any] = model.state_dict()
    assert set(state) == set(expected)
    for name, values in state.items():
        assert torch.equal(values, expected[name])
    ids = read_tokenizer(gguf).tokenizer.encode(TEXTS[0]).ids
    assert tokenizer(TEXTS[0])["input_ids"] == ids
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>user")


def test_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(ConfigError, match="GGUF"):
        GgufFile(path)


def test_other_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "mamba.gguf"
    writer = GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="mamba"):
        GgufFile(path)
