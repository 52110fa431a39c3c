"""Between the worker protocol and the router's own values. The only file that reads its messages.

What comes off the wire is checked here: a message that makes no sense raises ProtocolViolation,
and the link that read it ends.
"""

from collections.abc import Sequence

from core.block_hash import HASH_BYTES, unpack_hashes
from core.errors import ErrorCode
from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, TokenLogprobs
from core.version import PROTOCOL, installed_version
from router.fleet.worker import (
    CacheChange,
    KvLayout,
    LegEnd,
    LinkFailure,
    Phase,
    Place,
    PromptRun,
    Role,
    StageTimes,
    TokenRun,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
)
from router.generation import Token
from rpc.token_batch import token_rows
from rpc.v1 import worker_pb2

_ROLES = {worker_pb2.ROLE_PREFILL: Role.PREFILL, worker_pb2.ROLE_DECODE: Role.DECODE}
_STATES = {
    worker_pb2.WORKER_STATE_READY: WorkerState.READY,
    worker_pb2.WORKER_STATE_DRAINING: WorkerState.DRAINING,
    worker_pb2.WORKER_STATE_STALLED: WorkerState.STALLED,
}
_REASONS = {
    worker_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    worker_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    worker_pb2.FINISH_REASON_ABORTED: FinishReason.ABORTED,
    worker_pb2.FINISH_REASON_FAILED: FinishReason.FAILED,
    worker_pb2.FINISH_REASON_HANDED_OVER: FinishReason.HANDED_OVER,
}
_MAX_UINT32 = 2**32 - 1
MAX_LINKS = 1024
"""Links taken from one load report."""
MAX_CAUSE_CHARS = 512
"""Of what such a link says that it fails of."""
MAX_TIERS = 16
"""Tiers taken from one load report."""


class ProtocolViolation(Exception):
    """A worker sent what the protocol does not allow."""


def info_from_proto(message: worker_pb2.WorkerDescription) -> WorkerInfo:
    """Raises ProtocolViolation if it has another protocol, no role or no block size."""
    if message.protocol != PROTOCOL:
        raise ProtocolViolation(
            f"it is of version {message.version or 'unknown'} with protocol {message.protocol}, "
            f"this router of {installed_version()} with {PROTOCOL}; give both the same version"
        )
    role = _ROLES.get(message.role)
    if role is None or message.layout.block_size < 1:
        raise ProtocolViolation(f"worker {message.worker_id!r} named no role or no block size")
    layout = message.layout
    return WorkerInfo(
        worker_id=message.worker_id,
        epoch=message.epoch,
        role=role,
        model=message.model,
        model_digest=message.model_digest,
        layout=KvLayout(
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            dtype=layout.dtype,
            block_bytes=layout.block_bytes,
        ),
        num_blocks=message.num_blocks,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        kv_address=message.kv_address,
        place=Place(zone=message.place.zone, rack=message.place.rack, host=message.place.host),
    )


def load_from_proto(message: worker_pb2.LoadReport) -> WorkerLoad:
    """An unknown state counts as stalled: nothing new is sent there."""
    return WorkerLoad(
        state=_STATES.get(message.state, WorkerState.STALLED),
        heartbeat_age_s=message.heartbeat_age_ms / 1e3,
        waiting=message.waiting,
        running=message.running,
        backlog_tokens=message.backlog_tokens,
        held_blocks=message.held_blocks,
        cached_blocks=message.cached_blocks,
        awaited_blocks=message.awaited_blocks,
        leases=message.leases,
        prefill_tokens_per_s=_measured(message.prefill_tokens_per_s),
        decode_step_s=_measured(message.decode_step_s),
        host_bytes_per_s=max(
            (
                _measured(each.bytes_per_s)
                for each in message.tiers[:MAX_TIERS]
                if each.tier == worker_pb2.CACHE_TIER_HOST
            ),
            default=0.0,
        ),
        link_bytes_per_s={
            link.prefill_worker_id: link.bytes_per_s
            for link in message.links[:MAX_LINKS]
            if _measured(link.bytes_per_s)
        },
        link_latency_s={
            link.prefill_worker_id: link.latency_s
            for link in message.links[:MAX_LINKS]
            if _measured(link.latency_s)
        },
        link_failures={
            link.prefill_worker_id: LinkFailure(link.prefill_epoch, link.failure[:MAX_CAUSE_CHARS])
            for link in message.links[:MAX_LINKS]
            if link.failure
        },
        transport=message.transport,
    )


def cache_from_proto(message: worker_pb2.CacheEvents) -> CacheChange:
    """Raises ProtocolViolation if the hashes are cut short. Tiers not known here are left out."""
    host = [each for each in message.lower if each.tier == worker_pb2.CACHE_TIER_HOST]
    try:
        stored, removed = unpack_hashes(message.stored), unpack_hashes(message.removed)
        host_stored = [block for each in host for block in unpack_hashes(each.stored)]
        host_removed = [block for each in host for block in unpack_hashes(each.removed)]
    except ValueError as error:
        raise ProtocolViolation(str(error)) from error
    return CacheChange(
        epoch=message.epoch,
        seq=message.seq,
        reset=message.reset,
        stored=stored,
        removed=removed,
        host_stored=host_stored,
        host_removed=host_removed,
    )


def token_runs_from_proto(message: worker_pb2.TokenBatch) -> list[TokenRun]:
    """Raises ProtocolViolation if its columns do not match."""
    runs: list[TokenRun] = []
    try:
        for request_id, attempt, first, token_ids, logprobs, cached_tokens in token_rows(message):
            if logprobs:
                entries = zip(token_ids, map(_logprobs_from_proto, logprobs), strict=True)
                tokens = [Token(i, *entry) for i, entry in enumerate(entries, first)]
            elif len(token_ids) == 1:
                tokens = [Token(first, token_ids[0])]
            else:
                tokens = [Token(i, token_id) for i, token_id in enumerate(token_ids, first)]
            runs.append((request_id, attempt, tokens, cached_tokens))
    except ValueError as error:
        raise ProtocolViolation(str(error)) from error
    return runs


def prompt_run_from_proto(message: worker_pb2.PromptLogprobs) -> PromptRun:
    """Raises ProtocolViolation if its lists do not match."""
    count, num_top = len(message.logprobs), message.num_top
    tops = {len(message.top_ids), len(message.top_logprobs)}
    if message.first < 1 or not count or len(message.ranks) != count or tops != {count * num_top}:
        raise ProtocolViolation(f"log probabilities of {count} prompt tokens are incomplete")
    return PromptRun(
        message.request_id,
        message.attempt,
        PromptLogprobs(
            first=message.first,
            logprobs=list(message.logprobs),
            ranks=list(message.ranks),
            num_top=num_top,
            top_ids=list(message.top_ids),
            top_logprobs=list(message.top_logprobs),
        ),
    )


def leg_end_from_proto(message: worker_pb2.Finished) -> LegEnd:
    """An unknown reason or error code counts as an internal failure."""
    times = message.times
    return LegEnd(
        request_id=message.request_id,
        attempt=message.attempt,
        reason=_REASONS.get(message.reason, FinishReason.FAILED),
        error_code=_error_code(message.error_code),
        error_message=message.error_message,
        cached_tokens=message.cached_tokens,
        kv_bytes=message.kv_bytes,
        times=StageTimes(
            queue_s=times.queue_s,
            prefill_s=times.prefill_s,
            transfer_s=times.transfer_s,
            decode_queue_s=times.decode_queue_s,
            first_decode_s=times.first_decode_s,
        )
        if message.HasField("times")
        else None,
        matched_stop=message.matched_stop if message.HasField("matched_stop") else None,
    )


def sampling_to_proto(sampling: SamplingParams) -> worker_pb2.SamplingParams:
    """For the wire, value for value."""
    return worker_pb2.SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        structured=worker_pb2.StructuredOutput(
            kind=sampling.structured.kind, definition=sampling.structured.definition
        )
        if sampling.structured is not None
        else None,
    )


def submit_to_proto(
    *,
    request_id: str,
    attempt: int,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    block_hashes: Sequence[bytes],
    root_hash: bytes,
    sampling: SamplingParams,
    remaining_s: float,
) -> worker_pb2.Submit:
    """All of a Submit but its phase."""
    assert all(len(block_hash) == HASH_BYTES for block_hash in block_hashes[:1])
    return worker_pb2.Submit(
        request_id=request_id,
        attempt=attempt,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        block_hashes=b"".join(block_hashes),
        root_hash=root_hash,
        sampling=sampling_to_proto(sampling),
        deadline_ms=min(max(1, int(remaining_s * 1e3)), _MAX_UINT32),
    )


def with_phase(
    submit: worker_pb2.Submit, phase: Phase, peer: WorkerInfo | None
) -> worker_pb2.RouterMessage:
    """What one leg's worker is sent.

    Args:
        submit: what every leg of the attempt has in common; changed here.
        phase: of this leg.
        peer: the worker of the other leg; None for a local one.
    """
    match phase:
        case Phase.LOCAL:
            submit.local.SetInParent()
        case Phase.EXPORT:
            assert peer is not None
            submit.export.decode_worker_id = peer.worker_id
        case Phase.IMPORT:
            assert peer is not None
            imported = getattr(submit, "import")  # a keyword of Python
            imported.prefill_worker_id = peer.worker_id
            imported.prefill_epoch = peer.epoch
            imported.kv_address = peer.kv_address
    return worker_pb2.RouterMessage(submit=submit)


def _measured(value: float) -> float:
    """0 for what nothing can take or do: every sum that it is part of would mean nothing."""
    return value if 1e-9 < value < 1e18 else 0.0


def _error_code(code: str) -> ErrorCode:
    try:
        return ErrorCode(code)
    except ValueError:
        return ErrorCode.INTERNAL


def _logprobs_from_proto(message: worker_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple((top.token_id, top.logprob) for top in message.top))
