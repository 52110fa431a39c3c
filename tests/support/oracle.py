"""Hugging Face transformers as the oracle: what greedy output has to be, token for token."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch


@dataclass
class Oracle:
    """A checkpoint under transformers."""

    folder: Path
    dtype: torch.dtype = torch.float32

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).eval()

    @cached_property
    def tokenizer(self) -> Any:
        # Not AutoTokenizer: for model type qwen2 it takes that family's own splitting of text,
        # whatever tokenizer.json says, and the tiny checkpoints' tokenizer is not of that family.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt of a conversation."""
        ids = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(token) for token in ids]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Of the token after a sequence, [vocab_size]."""
        with torch.inference_mode():
            found: torch.Tensor = self._model(torch.tensor([list(ids)])).logits[0, -1]
        return found.clone()

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int, *, ignore_eos: bool) -> list[int]:
        """Greedy continuation, without the end-of-sequence token."""
        prompt = torch.tensor([list(prompt_ids)])
        eos = self._model.generation_config.eos_token_id
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None if ignore_eos else eos,
                pad_token_id=0,
            )
        ids = [int(token) for token in out[0, len(prompt_ids) :]]
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        if not ignore_eos and ids and ids[-1] in ends:
            ids.pop()
        return ids
