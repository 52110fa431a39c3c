"""Between the wire's messages and the engine's own values. Checks what came off the wire."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

from core.block_hash import pack_hashes, unpack_hashes
from core.errors import DiptychError, ErrorCode, InvalidRequestError
from core.finish import FinishReason
from core.sampling import SamplingParams, StructuredOutput, StructureKind
from core.tokens import PromptLogprobs, TokenLogprobs
from engine.request import EngineRequest, EngineStats
from rpc.v1 import worker_pb2

PROMPT_LOGPROBS_AT_ONCE = 1024
"""Positions in one message: at most 180 kB with the 20 most likely tokens of each."""
_FINISH = {
    FinishReason.STOP: worker_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: worker_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: worker_pb2.FINISH_REASON_ABORTED,
    FinishReason.FAILED: worker_pb2.FINISH_REASON_FAILED,
    FinishReason.HANDED_OVER: worker_pb2.FINISH_REASON_HANDED_OVER,
}


def sampling_from_proto(message: worker_pb2.SamplingParams) -> SamplingParams:
    """Raises InvalidRequestError where a value is out of its range."""
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(message.logit_bias),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        structured=StructuredOutput(
            kind=cast(StructureKind, message.structured.kind),  # checked by the class
            definition=message.structured.definition,
        )
        if message.HasField("structured")
        else None,
    )


def request_from_proto(
    message: worker_pb2.Submit, *, engine_id: str, vocab_size: int, block_size: int
) -> EngineRequest:
    """The engine's request for a Submit.

    Raises:
        InvalidRequestError: no prompt, an id outside the vocabulary, or hashes that don't fit it.
    """
    prompt_ids = list(message.prompt_ids)
    output_ids = list(message.output_ids)
    if not prompt_ids:
        raise InvalidRequestError("The prompt holds no tokens.", param="prompt")
    highest = max(max(prompt_ids), max(output_ids, default=0))
    if highest >= vocab_size:
        raise InvalidRequestError(
            f"Token id {highest} is outside the model's vocabulary of {vocab_size}.", param="prompt"
        )
    try:
        hashes = unpack_hashes(message.block_hashes)
    except ValueError as error:
        raise InvalidRequestError(f"block_hashes: {error}.", param="block_hashes") from error
    expected = (len(prompt_ids) + len(output_ids)) // block_size
    if len(hashes) != expected:
        raise InvalidRequestError(
            f"{len(hashes)} block hashes came with {expected} full blocks of {block_size} tokens.",
            param="block_hashes",
        )
    sampling = sampling_from_proto(message.sampling)
    phase = message.WhichOneof("phase")
    if phase == "import":
        # Who computes the prompt reports; here it is computed only if it must be again.
        sampling = replace(sampling, prompt_logprobs=None)
    return EngineRequest(
        request_id=engine_id,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        sampling=sampling,
        block_hashes=hashes,
        root_hash=message.root_hash or None,
        prefill_only=phase == "export",
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> worker_pb2.TokenLogprobs:
    """For the wire."""
    return worker_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top=[worker_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in logprobs.top],
    )


def prompt_logprobs_to_proto(
    logprobs: PromptLogprobs, *, request_id: str, attempt: int
) -> Iterator[worker_pb2.PromptLogprobs]:
    """For the wire, in messages of bounded size."""
    for start in range(logprobs.first, logprobs.end, PROMPT_LOGPROBS_AT_ONCE):
        part = logprobs.part(start, min(start + PROMPT_LOGPROBS_AT_ONCE, logprobs.end))
        yield worker_pb2.PromptLogprobs(
            request_id=request_id,
            attempt=attempt,
            first=part.first,
            logprobs=part.logprobs,
            ranks=part.ranks,
            num_top=part.num_top,
            top_ids=part.top_ids,
            top_logprobs=part.top_logprobs,
        )


def finish_to_proto(reason: FinishReason) -> "worker_pb2.FinishReason":
    """For the wire."""
    return _FINISH[reason]


def error_of(error: BaseException) -> tuple[ErrorCode, str]:
    """Code and sentence of any exception; an unexpected one is INTERNAL."""
    if isinstance(error, DiptychError):
        return error.code, error.message
    return ErrorCode.INTERNAL, f"{type(error).__name__}: {error}"


def load_to_proto(stats: EngineStats, *, draining: bool, leases: int) -> worker_pb2.LoadReport:
    """A load report; the service fills in the heartbeat's age."""
    return worker_pb2.LoadReport(
        state=worker_pb2.WORKER_STATE_DRAINING if draining else worker_pb2.WORKER_STATE_READY,
        waiting=stats.waiting,
        running=stats.running,
        backlog_tokens=stats.backlog_tokens,
        free_blocks=stats.free_blocks,
        cached_blocks=stats.cached_blocks,
        held_blocks=stats.held_blocks,
        leases=leases,
        prefill_tokens_per_s=stats.prefill_tokens_per_s,
        decode_step_s=stats.decode_step_s,
        tiers=[
            worker_pb2.TierRate(tier=tier, bytes_per_s=rate)
            for tier, rate in [(worker_pb2.CACHE_TIER_HOST, stats.host.bytes_per_s)]
            if rate
        ],
    )


def lower_tiers_to_proto(
    host_stored: Sequence[bytes], host_removed: Sequence[bytes] = ()
) -> list[worker_pb2.TierChange]:
    """What changed below the device, for CacheEvents; nothing where nothing did."""
    if not host_stored and not host_removed:
        return []
    return [
        worker_pb2.TierChange(
            tier=worker_pb2.CACHE_TIER_HOST,
            stored=pack_hashes(host_stored),
            removed=pack_hashes(host_removed),
        )
    ]
