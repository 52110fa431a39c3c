"""A tokenizer of any size for models with random weights: serving needs one, the work does not."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json: the 256 bytes first, then words that no text contains.

    No chat template and no special tokens, so prompts are given as token ids or plain text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"t{index}" for index in range(len(alphabet), vocab_size)]
    vocab = {token: index for index, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
