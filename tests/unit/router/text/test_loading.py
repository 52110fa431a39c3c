import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from router.text.loading import load_text
from router.text.processor import INLINE_CHARS
from tests.support.router_api import byte_tokenizer, piece_tokenizer

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    _config(tmp_path, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    return tmp_path


def _config(folder: Path, **fields: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_template_file_beats_config_and_option_beats_both(folder: Path) -> None:
    _config(folder, chat_template="config")
    assert load_text(folder).render_chat(USER) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert load_text(folder).render_chat(USER) == "file"
    (folder / "own.jinja").write_text("own")
    assert load_text(folder, chat_template=folder / "own.jinja").render_chat(USER) == "own"


async def test_add_bos_and_add_eos_decide_alone_once_given(folder: Path) -> None:
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    plain = await load_text(folder).encode("hi")
    _config(folder, **tokens, add_bos_token=True)
    assert await load_text(folder).encode("hi") == [1, *plain]
    _config(folder, **tokens, add_bos_token=True, add_eos_token=True)
    text = load_text(folder)
    assert await text.encode("hi") == [1, *plain, 2]
    assert await text.encode("hi", add_special_tokens=False) == plain


async def test_post_processor_of_tokenizer_json_is_kept_without_them(tmp_path: Path) -> None:
    piece_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert (await load_text(tmp_path).encode("!"))[0] == 1


async def test_truncation_and_padding_of_tokenizer_json_are_off(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(await load_text(folder).encode("wxyz")) == 4


async def test_long_text_encodes_like_short_text(folder: Path) -> None:
    text = load_text(folder)
    once = await text.encode("xyz")
    assert await text.encode("xyz" * INLINE_CHARS) == once * INLINE_CHARS


def test_missing_or_broken_files_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jinja"):
        load_text(folder, chat_template=folder / "none.jinja")
    _config(folder, add_bos_token=True, bos_token="<none>")
    with pytest.raises(ConfigError, match="<none>"):
        load_text(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_text(folder)
