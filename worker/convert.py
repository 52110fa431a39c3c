"""Between the wire's messages and the engine's own values. Checks what came off the wire."""

from typing import cast

from core.block_hash import unpack_hashes
from core.errors import DiptychError, ErrorCode, InvalidRequestError
from core.finish import FinishReason
from core.sampling import SamplingParams, StructuredOutput, StructureKind
from core.tokens import TokenLogprobs
from engine.request import EngineRequest, EngineStats
from rpc.v1 import worker_pb2

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
    return EngineRequest(
        request_id=engine_id,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        sampling=sampling_from_proto(message.sampling),
        block_hashes=hashes,
        root_hash=message.root_hash or None,
        prefill_only=message.WhichOneof("phase") == "export",
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> worker_pb2.TokenLogprobs:
    """For the wire."""
    return worker_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top=[worker_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in logprobs.top],
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
    )
