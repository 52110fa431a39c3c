"""Turns a request into a sequence, or says what is wrong with it.

Called by `Engine` when a request is added or reserved. What passes here can always be served: its
ids are in the vocabulary and, alone in the KV pool, it fits.
"""

from collections.abc import Sequence

from core.block_hash import hash_blocks
from core.errors import ErrorCode, InvalidRequestError
from engine.request import EngineRequest
from engine.sequence import SequenceState


class Intake:
    """The limits of one engine, applied to each request."""

    def __init__(
        self,
        *,
        model_len: int,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        root_hash: bytes | None,
    ) -> None:
        """Args: root_hash is None when nothing is to be cached."""
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._root_hash = root_hash
        self._model_len = model_len

    @property
    def max_len(self) -> int:
        """Longest prompt + output in tokens: the model's limit, or what the KV pool holds."""
        return min(self._model_len, self._num_blocks * self._block_size)

    def sequence(self, request: EngineRequest, now: float) -> SequenceState:
        """Build the sequence of a request that arrived at `now`.

        Raises:
            InvalidRequestError: the request can never be served; the message says why.
        """
        token_ids = [*request.prompt_ids, *request.output_ids]
        sampling = request.sampling
        self._check_length(request, len(token_ids))
        self._check_ids("prompt", token_ids)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", list(sampling.logit_bias))
        eos_ids = () if sampling.ignore_eos else self._eos_token_ids
        if sampling.structured is not None and not eos_ids:
            raise InvalidRequestError(
                "The model names no end-of-sequence token, and a structured output ends with one.",
                param="structured",
            )
        root = self._root_hash
        hashes: list[bytes] = []
        if root is not None and request.block_hashes is not None:
            hashes = self._given_hashes(request.block_hashes, len(token_ids))
            # They may carry a salt that isn't known here, so their root must come with them.
            root = request.root_hash
        elif root is not None:
            hashes = hash_blocks(token_ids, self._block_size, root)
        return SequenceState(
            request_id=request.request_id,
            sampling=sampling,
            prompt_ids=request.prompt_ids,
            output_ids=list(request.output_ids),
            token_ids=token_ids,
            block_hashes=hashes,
            root_hash=root,
            end_ids=tuple(dict.fromkeys((*eos_ids, *sampling.stop_token_ids))),
            max_len=min(len(request.prompt_ids) + sampling.max_tokens, self.max_len),
            prefill_only=request.prefill_only,
            needs_history=sampling.penalised,
            arrived_at=now,
        )

    def _check_length(self, request: EngineRequest, length: int) -> None:
        if not request.prompt_ids:
            raise InvalidRequestError(
                "The prompt has no tokens; send at least one.", param="prompt"
            )
        if len(request.output_ids) >= request.sampling.max_tokens:
            raise InvalidRequestError(
                f"max_tokens is {request.sampling.max_tokens} and {len(request.output_ids)} tokens "
                "were generated already; nothing is left to do.",
                param="max_tokens",
            )
        if length < self.max_len:
            return
        limit = f"the model takes {self._model_len}"
        if self.max_len < self._model_len:
            limit = (
                f"the KV pool of this worker holds {self.max_len} "
                f"({self._num_blocks} blocks of {self._block_size})"
            )
        raise InvalidRequestError(
            f"The prompt has {length} tokens and {limit}, one of them for the output; shorten the "
            f"prompt to at most {self.max_len - 1} tokens.",
            param="prompt",
            code=ErrorCode.CONTEXT_LENGTH,
        )

    def _check_ids(self, param: str, ids: Sequence[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            worst = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidRequestError(
                f"{param} holds token id {worst}; the model's ids are 0 to {self._vocab_size - 1}.",
                param=param,
            )

    def _given_hashes(self, hashes: Sequence[bytes], length: int) -> list[bytes]:
        if len(hashes) != length // self._block_size:
            raise InvalidRequestError(
                f"block_hashes has {len(hashes)} hashes; {length} tokens fill "
                f"{length // self._block_size} blocks of {self._block_size}.",
                param="block_hashes",
            )
        return list(hashes)
