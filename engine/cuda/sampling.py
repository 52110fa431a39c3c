"""Turns logits into tokens on the device; the host never waits. GPU runners call it.

`draw_plain` draws every row from its logits as they are, and can be part of a CUDA graph. After it,
`Sampler.draw` draws again the rows whose settings ask for more and gathers log probabilities.

The meaning is that of engine.sampler, the reference: a token is a function of the row's logits and
its SampleSpec alone and the same as on a CPU, but where the draw lies within rounding (some 1e-6 of
the mass) of the border between two tokens, or a filter's limit as near to a token's probability.
"""

from collections.abc import Sequence
from math import log
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from core.sampling import SamplingParams
from engine.cuda.kernels.sampling import CHUNK, chunk_stats, pick, sum_above
from engine.cuda.kernels.sampling_filter import CANDIDATES, GROUPS, floors_of
from engine.cuda.sampling_changes import Changes, TokenHistory, apply_, list_changes
from engine.cuda.sampling_copies import send
from engine.cuda.sampling_logprobs import DeviceLogprobs, logprobs_of
from engine.grammar.backend import num_words
from engine.plan import SampleSpec
from engine.sampler.logits import is_plain

_NONE = float("-inf")


class PlainArrays(NamedTuple):
    """What `draw_plain` needs of N specs, on the host."""

    temperatures: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.int64]
    """The bits of seeds in [0, 2**64)."""
    positions: npt.NDArray[np.int64]


def plain_arrays(specs: Sequence[SampleSpec]) -> PlainArrays:
    """Collect them; about 0.2 us per spec and array."""
    params = [spec.params for spec in specs]
    return PlainArrays(
        np.array([p.temperature for p in params], np.float32),
        np.array([p.seed for p in params], np.uint64).view(np.int64),
        np.array([spec.position for spec in specs], np.int64),
    )


def needs_more(spec: SampleSpec) -> bool:
    """True if `draw_plain` is not all that the row needs."""
    return spec.params.logprobs is not None or _is_filtered(spec) or not is_plain(spec)


def draw_plain(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    *,
    chunk: int = CHUNK,
) -> None:
    """Draw one token per row. Two kernels; what they do depends on shapes alone.

    Reads the logits once, then one chunk of each row; 10 bytes per chunk besides.

    Args:
        logits: [N, vocab_size], any float dtype; rows of any stride.
        temperatures: [N] float32; 0 takes the largest logit, of equal ones the lowest id.
        seeds: [N] int64, the bits of seeds in [0, 2**64).
        positions: [N] int32 or int64, index of the token in the whole output.
        out: [N] int32, written.
        chunk: logits per program, a power of two.
    """
    if len(out):
        maxima, sums, _ = chunk_stats(logits, None, temperatures, chunk=chunk)
        pick(logits, None, temperatures, seeds, positions, None, (maxima, sums), out, chunk=chunk)


class Sampler:
    """Draws the rows that need more than `draw_plain`. One thread calls it, in stream order."""

    def __init__(
        self, *, chunk: int = CHUNK, groups: int = GROUPS, candidates: int = CANDIDATES
    ) -> None:
        """Sizes are for tests: logits per program, groups per chunk, candidates per row."""
        self._chunk, self._groups, self._candidates = chunk, groups, candidates
        self._history = TokenHistory()

    def draw(
        self, logits: torch.Tensor, specs: Sequence[SampleSpec], out: torch.Tensor
    ) -> DeviceLogprobs | None:
        """Draw again where `needs_more`, and gather log probabilities where they are asked for.

        One copy to the device. Rows with penalties, bias, bans or masks are copied to float32 (4
        bytes per logit); others are read where they are: once whole, then chunks of likely tokens.

        Args:
            logits: [N, vocab_size], any float dtype; not written.
            specs: N of them.
            out: [N] int32 that `draw_plain` has written; rows drawn again are overwritten.

        Returns:
            Log probabilities of the rows that ask, None if no row does.
        """
        changed, filtered, asked = [], [], []
        for row, spec in enumerate(specs):
            if not is_plain(spec):
                changed.append(row)
            elif _is_filtered(spec):
                filtered.append(row)
            if spec.params.logprobs is not None:
                asked.append(row)
        redrawn = [*changed, *filtered]
        if not redrawn and not asked:
            return None
        chosen = [specs[row] for row in redrawn]
        changes = list_changes(chosen[: len(changed)], logits.shape[1], self._history)
        settings = _settings(chosen, logits.shape[1])
        asked_index, index, *sent = send(
            [
                np.array(asked, np.int64),
                np.array(redrawn, np.int64),
                *settings,
                *changes,
            ],
            logits.device,
        )
        if redrawn:
            on_device = _Settings(*sent[: len(settings)])
            drawn = torch.empty_like(out[: len(redrawn)])
            if changed:
                part = slice(0, len(changed))
                own = logits.index_select(0, index[part]).float()
                apply_(own, Changes(*sent[len(settings) :]))
                self._draw(own, None, on_device.cut(part), settings.cut(part), drawn[part])
            if filtered:
                part = slice(len(changed), len(redrawn))
                self._draw(
                    logits, index[part], on_device.cut(part), settings.cut(part), drawn[part]
                )
            out.scatter_(0, index, drawn)
        if not asked:
            return None
        counts = [specs[row].params.logprobs or 0 for row in asked]
        return logprobs_of(logits, out, asked_index, asked, counts)

    def rehearse(self, logits: torch.Tensor) -> None:
        """Launch every kernel of `draw` once, so that no request has to wait until it is built.

        Args:
            logits: [1 or more, vocab_size], as those that will be drawn from; not written.
        """
        out = torch.zeros(1, dtype=torch.int32, device=logits.device)
        filters, bias = {"top_p": 0.9, "top_k": 9, "min_p": 0.1}, {"logit_bias": {0: 1.0}}
        both = _rehearsed(**filters, **bias)
        both.mask = _Allowing(logits.shape[1])
        for spec in (_rehearsed(**filters), _rehearsed(**bias), both):
            self.draw(logits[:1], [spec], out)

    def _draw(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor | None,
        settings: "_Settings",
        on_host: "_Settings",
        out: torch.Tensor,
    ) -> None:
        filtered = on_host.filters_any()
        temperatures, chunk = settings.temperatures, self._chunk
        maxima, sums, grouped = chunk_stats(
            logits, rows, temperatures, groups=self._groups if filtered else 0, chunk=chunk
        )
        floors = None
        if grouped is not None:
            floors = floors_of(
                logits,
                rows,
                temperatures,
                (settings.top_ks, settings.top_ps, settings.drops),
                (maxima, sums, grouped),
                chunk=chunk,
                candidates=self._candidates,
            )
            sums = sum_above(logits, rows, temperatures, floors, maxima, chunk=chunk)
        pick(
            logits,
            rows,
            temperatures,
            settings.seeds,
            settings.positions,
            floors,
            (maxima, sums),
            out,
            chunk=chunk,
        )


class _Settings(NamedTuple):
    """Of N rows; arrays on the host, tensors on the device."""

    temperatures: Any
    seeds: Any
    positions: Any
    top_ks: Any
    """int32; 0: all."""
    top_ps: Any
    """float64; 1: all."""
    drops: Any
    """float32: how far below the largest logit min_p keeps; minus infinity: all."""

    def cut(self, part: slice) -> "_Settings":
        return _Settings(*(column[part] for column in self))

    def filters_any(self) -> bool:
        """On the host only."""
        return bool(
            (self.top_ks > 0).any() or (self.top_ps < 1).any() or (self.drops > _NONE).any()
        )


def _settings(specs: Sequence[SampleSpec], vocab_size: int) -> _Settings:
    # A greedy row takes the largest logit, which no filter drops.
    params = [spec.params for spec in specs]
    top_ks = [0 if p.greedy or p.top_k >= vocab_size else p.top_k for p in params]
    top_ps = [1.0 if p.greedy else p.top_p for p in params]
    drops = [_NONE if p.greedy or p.min_p <= 0 else p.temperature * log(p.min_p) for p in params]
    return _Settings(
        *plain_arrays(specs),
        np.array(top_ks, np.int32),
        np.array(top_ps, np.float64),
        np.array(drops, np.float32),
    )


def _rehearsed(**params: Any) -> SampleSpec:
    return SampleSpec(SamplingParams(**params), position=0, prompt_ids=(), output_ids=())


class _Allowing:
    """A TokenMask that allows all."""

    def __init__(self, vocab_size: int) -> None:
        self._words = np.full(num_words(vocab_size), -1, np.int32)

    def words(self) -> npt.NDArray[np.int32]:
        return self._words


def _is_filtered(spec: SampleSpec) -> bool:
    params = spec.params
    return not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
