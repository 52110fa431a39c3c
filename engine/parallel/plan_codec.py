"""Step plans as bytes, for the ranks that did not make them.

Called on rank 0 (PlanEncoder) and on every other rank (PlanDecoder), once per step, in order. What
a rank knows already is not sent again: a block table and an output that only grew travel as what
they grew by, sampling settings once per request. Invariant: encoder and decoder know the same
requests, each by the same slot; a lost or repeated message would break it, so there is none.

A message is a header of counts, one row of integers per chunk, the ids of all chunks by kind, the
masks, and then what is new of requests. All integers are little-endian.

Masks travel as they are, so that ranks need no grammars. Rank 0 reads them before it sends the
plan; so a step whose mask depends on a pending token is sent when that token is known.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from core.errors import InvalidRequestError
from core.sampling import SamplingParams
from engine.grammar.backend import Words
from engine.plan import Chunk, SampleSpec, ScoreSpec, StepPlan

_HEADER = struct.Struct("<6I")
"""Number of chunks, tokens, blocks, output ids, banned ids; words of a mask, 0 if there is none."""
_COLUMNS = 8
"""slot, flags, tokens, start, new blocks, position, new output ids, banned ids."""
_ID = np.dtype("<i4")
_ROW = np.dtype("<i8")

_SAMPLES = 1
_NEW_REQUEST = 2
_NEW_PARAMS = 4
_WHOLE_TABLE = 8
_WHOLE_OUTPUT = 16
_MASKED = 32
_SCORED = 64

_PARAMS = struct.Struct("<QQddQdQdddhBII")
_NO_LOGPROBS = -1
_BIAS = struct.Struct("<Id")
_LENGTH = struct.Struct("<I")
_SCORE = struct.Struct("<IB")
_MAX_COUNT = (1 << 64) - 1
_MIN_KNOWN = 64


def read_masks(plan: StepPlan) -> None:
    """Have all masks of a plan computed, so that encoding it waits for nothing and can't fail."""
    for chunk in plan.chunks:
        if chunk.sample is not None and chunk.sample.mask is not None:
            chunk.sample.mask.words()


class _Sent:
    """What the decoder knows of a request."""

    __slots__ = ("num_blocks", "num_output", "output", "params", "prompt", "slot", "table")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.table: Sequence[int] | None = None
        self.num_blocks = 0
        self.params: SamplingParams | None = None
        self.prompt: Sequence[int] | None = None
        self.output: Sequence[int] | None = None
        self.num_output = 0


class PlanEncoder:
    """Rank 0's side."""

    def __init__(self) -> None:
        self._known: dict[str, _Sent] = {}
        self._free: list[int] = []
        self._num_slots = 0
        self._max_known = _MIN_KNOWN

    def encode(self, plan: StepPlan) -> bytes:
        """The message for one step; every decoder must get it."""
        rows: list[int] = []
        tokens: list[int] = []
        blocks: list[int] = []
        outputs: list[int] = []
        banned: list[int] = []
        masks: list[Words] = []
        news: list[bytes] = []
        self._max_known = max(self._max_known, 2 * len(plan.chunks))
        for chunk in plan.chunks:
            sent = self._known.pop(chunk.request_id, None)
            flags = 0
            if sent is None:
                sent, flags = self._new(), _NEW_REQUEST
                news.append(_pack_text(chunk.request_id))
            # The order of the requests known is that of their last use.
            self._known[chunk.request_id] = sent
            table = chunk.block_table
            if sent.table is not table:
                sent.table, sent.num_blocks = table, 0
                flags |= _WHOLE_TABLE
            grown = table[sent.num_blocks :]
            blocks += grown
            sent.num_blocks += len(grown)
            tokens += chunk.token_ids
            if chunk.score is not None:
                flags |= _SCORED
                news.append(_pack_score(chunk.score))
            spec = chunk.sample
            if spec is None:
                rows += (sent.slot, flags, len(chunk.token_ids), chunk.start, len(grown), 0, 0, 0)
                continue
            flags |= _SAMPLES | self._note_params(sent, spec, news)
            num_output = len(outputs)
            if spec.params.penalised:
                flags |= _note_output(sent, spec, outputs)
            banned += spec.banned_ids
            if spec.mask is not None:
                flags |= _MASKED
                masks.append(spec.mask.words())
            rows += (
                sent.slot,
                flags,
                len(chunk.token_ids),
                chunk.start,
                len(grown),
                spec.position,
                len(outputs) - num_output,
                len(spec.banned_ids),
            )
        self._forget()
        counts = (len(plan.chunks), len(tokens), len(blocks), len(outputs), len(banned))
        ids = np.array([*tokens, *blocks, *outputs, *banned], _ID)
        header = _HEADER.pack(*counts, len(masks[0]) if masks else 0)
        bits = (mask.astype(_ID).tobytes() for mask in masks)
        return b"".join((header, np.array(rows, _ROW).tobytes(), ids.tobytes(), *bits, *news))

    def _new(self) -> _Sent:
        if self._free:
            return _Sent(self._free.pop())
        self._num_slots += 1
        return _Sent(self._num_slots - 1)

    def _note_params(self, sent: _Sent, spec: SampleSpec, news: list[bytes]) -> int:
        params = spec.params
        prompt = spec.prompt_ids if params.penalised else None
        if sent.params is params and sent.prompt is prompt:
            return 0
        sent.params, sent.prompt = params, prompt
        news.append(_pack_params(params))
        news.append(_pack_ids(prompt or ()))
        return _NEW_PARAMS

    def _forget(self) -> None:
        while len(self._known) > self._max_known:
            oldest = next(iter(self._known))
            self._free.append(self._known.pop(oldest).slot)


def _note_output(sent: _Sent, spec: SampleSpec, outputs: list[int]) -> int:
    flag = 0
    if sent.output is not spec.output_ids:
        sent.output, sent.num_output = spec.output_ids, 0
        flag = _WHOLE_OUTPUT
    grown = spec.output_ids[sent.num_output :]
    outputs += grown
    sent.num_output += len(grown)
    return flag


class _Known:
    """A request as a decoder remembers it. Lists grow in place, as those of the plan's maker do."""

    __slots__ = ("output", "params", "prompt", "request_id", "table")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.table: list[int] = []
        self.params = SamplingParams()
        self.prompt: Sequence[int] = ()
        self.output: list[int] = []


class _SentMask:
    """A TokenMask that rank 0 has computed."""

    __slots__ = ("_words",)

    def __init__(self, words: Words) -> None:
        self._words = words

    def words(self) -> Words:
        return self._words


class PlanDecoder:
    """Every other rank's side."""

    def __init__(self) -> None:
        self._slots: list[_Known] = []

    def decode(self, message: bytes) -> StepPlan:
        """The plan of one step, equal to the one encoded in all that an executor reads.

        Raises:
            ValueError: this is no message of the encoder, or not the next one.
        """
        try:
            return self._decode(message)
        except (IndexError, struct.error, UnicodeDecodeError, InvalidRequestError) as error:
            raise ValueError(f"This is no step plan: {error}.") from error

    def _decode(self, message: bytes) -> StepPlan:
        num_chunks, *counts, mask_words = _HEADER.unpack_from(message)
        offset = _HEADER.size
        rows = np.frombuffer(message, _ROW, num_chunks * _COLUMNS, offset)
        offset += rows.nbytes
        kinds: list[_Ids] = []
        for count in counts:
            ids = np.frombuffer(message, _ID, count, offset)
            kinds.append(_Ids(ids.tolist()))
            offset += ids.nbytes
        tokens, blocks, outputs, banned = kinds
        flags_of = rows.reshape(num_chunks, _COLUMNS)[:, 1]
        num_masks = int(np.count_nonzero(flags_of & _MASKED))
        masks = np.frombuffer(message, _ID, num_masks * mask_words, offset)
        offset += masks.nbytes
        unread = iter(masks.reshape(num_masks, mask_words))
        news = _News(message, offset)
        chunks = []
        for row in rows.reshape(num_chunks, _COLUMNS).tolist():
            slot, flags, num_tokens, start, num_blocks, position, num_output, num_banned = row
            if flags & _NEW_REQUEST:
                self._place(slot, _Known(news.text()))
            known = self._slots[slot]
            if flags & _WHOLE_TABLE:
                known.table = []
            known.table += blocks.take(num_blocks)
            score = news.score() if flags & _SCORED else None
            sample = None
            if flags & _SAMPLES:
                if flags & _NEW_PARAMS:
                    known.params, known.prompt = news.params(), news.ids()
                if flags & _WHOLE_OUTPUT:
                    known.output = []
                known.output += outputs.take(num_output)
                sample = SampleSpec(
                    known.params, position, known.prompt, known.output, banned.take(num_banned)
                )
                if flags & _MASKED:
                    sample.mask = _SentMask(next(unread))
            chunks.append(
                Chunk(known.request_id, tokens.take(num_tokens), start, known.table, sample, score)
            )
        if news.offset != len(message) or any(kind.left for kind in kinds):
            raise ValueError("This is no step plan: something is left over.")
        return StepPlan(chunks)

    def _place(self, slot: int, known: _Known) -> None:
        if slot == len(self._slots):
            self._slots.append(known)
        else:
            self._slots[slot] = known


class _Ids:
    """Ids of one kind, taken chunk by chunk."""

    __slots__ = ("_at", "_values")

    def __init__(self, values: list[int]) -> None:
        self._values = values
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._values) - self._at

    def take(self, count: int) -> list[int]:
        if not 0 <= count <= self.left:
            raise ValueError(f"This is no step plan: {count} ids of {self.left}.")
        self._at += count
        return self._values[self._at - count : self._at]


class _News:
    """The end of a message, read piece by piece."""

    __slots__ = ("_message", "offset")

    def __init__(self, message: bytes, offset: int) -> None:
        self._message = message
        self.offset = offset

    def text(self) -> str:
        return self._take(self._number()).decode()

    def ids(self) -> list[int]:
        values: list[int] = np.frombuffer(self._take(self._number() * _ID.itemsize), _ID).tolist()
        return values

    def score(self) -> ScoreSpec:
        first, num_top = _SCORE.unpack(self._take(_SCORE.size))
        return ScoreSpec(first, self.ids(), num_top)

    def params(self) -> SamplingParams:
        values: tuple[Any, ...] = _PARAMS.unpack(self._take(_PARAMS.size))
        *_, ignore_eos, num_bias, num_stops = values
        bias = dict(_BIAS.unpack(self._take(_BIAS.size)) for _ in range(num_bias))
        stops = np.frombuffer(self._take(num_stops * _ID.itemsize), _ID).tolist()
        return SamplingParams(
            max_tokens=values[0],
            min_tokens=values[1],
            temperature=values[2],
            top_p=values[3],
            top_k=values[4],
            min_p=values[5],
            seed=values[6],
            presence_penalty=values[7],
            frequency_penalty=values[8],
            repetition_penalty=values[9],
            logprobs=None if values[10] == _NO_LOGPROBS else values[10],
            ignore_eos=bool(ignore_eos),
            logit_bias=bias,
            stop_token_ids=tuple(stops),
        )

    def _number(self) -> int:
        (number,) = _LENGTH.unpack(self._take(_LENGTH.size))
        return int(number)

    def _take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self._message):
            raise ValueError("This is no step plan: it ends early.")
        piece = self._message[self.offset : end]
        self.offset = end
        return piece


def _pack_text(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def _pack_ids(ids: Sequence[int]) -> bytes:
    return _LENGTH.pack(len(ids)) + np.array(ids, _ID).tobytes()


def _pack_score(score: ScoreSpec) -> bytes:
    return _SCORE.pack(score.first, score.num_top) + _pack_ids(score.token_ids)


def _pack_params(params: SamplingParams) -> bytes:
    head = _PARAMS.pack(
        # Beyond any length of output or vocabulary, larger numbers mean the same.
        min(params.max_tokens, _MAX_COUNT),
        min(params.min_tokens, _MAX_COUNT),
        params.temperature,
        params.top_p,
        min(params.top_k, _MAX_COUNT),
        params.min_p,
        params.seed,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        _NO_LOGPROBS if params.logprobs is None else params.logprobs,
        params.ignore_eos,
        len(params.logit_bias),
        len(params.stop_token_ids),
    )
    bias = b"".join(_BIAS.pack(*item) for item in params.logit_bias.items())
    return head + bias + np.array(params.stop_token_ids, _ID).tobytes()
