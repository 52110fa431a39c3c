"""Penalties, bias, bans and masks of many rows as tensors: what engine.sampler.logits does to one.

The host lists which logits change and by how much; the device applies all rows together. A
`TokenHistory` remembers what it counted, so that a step costs the host a few microseconds per row
and not a walk through prompt and output.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.cuda.kernels.sampling_mask import forbid
from engine.grammar.backend import Words, num_words
from engine.plan import SampleSpec

Ids = npt.NDArray[np.int64]
Amounts = npt.NDArray[np.float32]


class _Counted:
    """Distinct tokens of one growing sequence and how often each occurs."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.length = 0
        self._slot_of: dict[int, int] = {}
        self._ids: Ids = np.empty(64, np.int64)
        self._counts: Amounts = np.empty(64, np.float32)

    def extend(self, vocab_size: int) -> None:
        for index in range(self.length, len(self.tokens)):
            token_id = self.tokens[index]
            slot = self._slot_of.get(token_id)
            if slot is not None:
                self._counts[slot] += 1
            elif 0 <= token_id < vocab_size:
                slot = self._slot_of[token_id] = len(self._slot_of)
                if slot == len(self._ids):
                    self._ids = np.concatenate((self._ids, self._ids))
                    self._counts = np.concatenate((self._counts, self._counts))
                self._ids[slot], self._counts[slot] = token_id, 1
        self.length = len(self.tokens)

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._slot_of)]

    @property
    def counts(self) -> Amounts:
        return self._counts[: len(self._slot_of)]


class TokenHistory:
    """What the prompts and outputs seen in the last step hold.

    NOTE: a sequence is known by its identity, which is why it is held here; it may only grow.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Counted] = {}
        self._used: dict[int, _Counted] = {}

    def count(self, tokens: Sequence[int], vocab_size: int) -> _Counted:
        """Distinct ids of the vocabulary in `tokens` and their counts; views, not to be kept."""
        counted = self._used.get(id(tokens)) or self._known.get(id(tokens))
        if counted is None or counted.length > len(tokens):
            counted = _Counted(tokens)
        counted.extend(vocab_size)
        self._used[id(tokens)] = counted
        return counted

    def end_step(self) -> None:
        """Forget what was not asked for since the last call."""
        self._known, self._used = self._used, {}


class Changes(NamedTuple):
    """Indices into flattened logits [N * vocab_size] and what to do there, in this order.

    Arrays on the host, tensors on the device.
    """

    scaled: Any
    """int64; may repeat, then with the same scale."""
    scales: Any
    """float32: divides positive logits, multiplies others."""
    lowered: Any
    """int64, each once."""
    lowered_by: Any
    """float32."""
    biased: Any
    """int64, each once."""
    biases: Any
    """float32."""
    banned: Any
    """int64; these become minus infinity."""
    masked: Any
    """[M] int64: rows of the logits, not indices, that have a mask."""
    masks: Any
    """[M, ceil(vocab_size / 32)] int32: what those rows allow; see TokenMask."""


def list_changes(specs: Sequence[SampleSpec], vocab_size: int, history: TokenHistory) -> Changes:
    """Changes to N rows, as numpy arrays. Ids outside the vocabulary are left out.

    Reads masks, which may wait for the step before.
    """
    scaled, lowered, biased, banned = _Indices(), _Indices(), _Indices(), _Indices()
    scales: list[float] = []
    lowered_by: list[Amounts] = []
    biases: list[float] = []
    masks: dict[int, Words] = {}
    for row, spec in enumerate(specs):
        params, start = spec.params, row * vocab_size
        if params.repetition_penalty != 1:
            for tokens in (spec.prompt_ids, spec.output_ids):
                scaled.add(history.count(tokens, vocab_size).ids, start)
                scales.append(params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            counted = history.count(spec.output_ids, vocab_size)
            lowered.add(counted.ids, start)
            per_token = np.float32(params.frequency_penalty) * counted.counts
            lowered_by.append(np.float32(params.presence_penalty) + per_token)
        if params.logit_bias:
            known = {i: bias for i, bias in params.logit_bias.items() if 0 <= i < vocab_size}
            biased.add(np.array(list(known), np.int64), start)
            biases.extend(known.values())
        if spec.banned_ids:
            ids = np.array([i for i in spec.banned_ids if 0 <= i < vocab_size], np.int64)
            banned.add(ids, start)
        if spec.mask is not None:
            masks[row] = spec.mask.words()
    history.end_step()
    return Changes(
        scaled=scaled.joined(),
        scales=np.repeat(np.array(scales, np.float32), scaled.lengths),
        lowered=lowered.joined(),
        lowered_by=np.concatenate((np.empty(0, np.float32), *lowered_by)),
        biased=biased.joined(),
        biases=np.array(biases, np.float32),
        banned=banned.joined(),
        masked=np.array(list(masks), np.int64),
        masks=np.array(list(masks.values()), np.int32).reshape(-1, num_words(vocab_size)),
    )


def apply_(logits: torch.Tensor, changes: Changes) -> None:
    """Change `logits` [N, vocab_size] float32, contiguous, in place; `changes` of tensors."""
    flat = logits.view(-1)
    if len(changes.scaled):
        values = flat.gather(0, changes.scaled)
        scaled = torch.where(values > 0, values / changes.scales, values * changes.scales)
        flat.scatter_(0, changes.scaled, scaled)
    if len(changes.lowered):
        flat.scatter_add_(0, changes.lowered, -changes.lowered_by)
    if len(changes.biased):
        flat.scatter_add_(0, changes.biased, changes.biases)
    if len(changes.banned):
        flat.scatter_(0, changes.banned, float("-inf"))
    if len(changes.masked):
        forbid(logits, changes.masked, changes.masks)


class _Indices:
    """Ids of several rows, shifted to where each row starts."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._parts: list[Ids] = []
        self._starts: list[int] = []

    def add(self, ids: Ids, start: int) -> None:
        self._parts.append(ids)
        self.lengths.append(len(ids))
        self._starts.append(start)

    def joined(self) -> Ids:
        ids = np.concatenate((np.empty(0, np.int64), *self._parts))
        return ids + np.repeat(np.array(self._starts, np.int64), self.lengths)
