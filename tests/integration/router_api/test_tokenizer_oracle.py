"""Prompts and texts are transformers' own, for the demo model and for a tokenizer that adds BOS."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from core.modelfile.resolve import resolve_model
from router.text.loading import load_text
from router.text.processor import TextProcessor
from tests.support.router_api import CHAT_TEMPLATE, piece_tokenizer

TEXTS = [
    "Hello",
    "  leading and trailing  ",
    "12345 + 678",
    "<|im_start|>user\nhi<|im_end|>",
    "Grüße aus Köln, 你好, привет, 🙂👩‍👩‍👧",
    "def f(x):\n\treturn x  # tab\r\n",
    "\u0000\u200b\ufffd",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hi 你好"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " a\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "<|im_end|>"},
    ],
]


@pytest.fixture(scope="module", params=["demo", "pieces"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return resolve_model("demo")
    path = tmp_path_factory.mktemp("pieces")
    piece_tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": "{{ bos_token }}" + CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def text(folder: Path) -> TextProcessor:
    return load_text(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


async def test_prompts_have_the_same_ids(text: TextProcessor, oracle: Any) -> None:
    for prompt in TEXTS:
        for special in (True, False):
            expected = oracle(prompt, add_special_tokens=special)["input_ids"]
            assert await text.encode(prompt, add_special_tokens=special) == expected, prompt


@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
async def test_chats_have_the_same_ids(text: TextProcessor, oracle: Any, options: Any) -> None:
    for chat in CHATS:
        rendered = text.render_chat(chat, **options)
        assert rendered == oracle.apply_chat_template(chat, tokenize=False, **options)
        expected = oracle.apply_chat_template(chat, **options)["input_ids"]
        assert await text.encode(rendered, add_special_tokens=False) == expected


async def test_pieces_concatenate_to_the_same_text(text: TextProcessor, oracle: Any) -> None:
    outputs = [await text.encode(prompt) for prompt in TEXTS]
    if len(oracle) > 1000:  # byte-level: any ids, whether they make whole characters or not
        draw = random.Random(0)
        outputs += [draw.choices(range(len(oracle)), k=30) for _ in range(50)]
    for ids in outputs:
        for skip in (True, False):
            detokeniser = text.detokeniser(skip_special_tokens=skip)
            pieces = [*(detokeniser.feed(token_id) for token_id in ids), detokeniser.finish()]
            assert "".join(pieces) == oracle.decode(ids, skip_special_tokens=skip)
