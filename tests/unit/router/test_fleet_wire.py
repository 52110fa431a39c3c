import pytest

from core.errors import ErrorCode
from core.finish import FinishReason
from core.sampling import SamplingParams, StructuredOutput
from core.tokens import PromptLogprobs, TokenLogprobs, join_prompt_logprobs
from core.version import PROTOCOL
from router.fleet.wire import (
    ProtocolViolation,
    cache_from_proto,
    info_from_proto,
    leg_end_from_proto,
    load_from_proto,
    prompt_run_from_proto,
    sampling_to_proto,
    submit_to_proto,
    token_runs_from_proto,
    with_phase,
)
from router.fleet.worker import Distance, Phase, Place, WorkerState
from router.generation import Token
from rpc.token_batch import TokenRow, token_batch
from rpc.v1 import worker_pb2
from tests.support.router_placement import make_info
from worker.convert import (
    PROMPT_LOGPROBS_AT_ONCE,
    prompt_logprobs_to_proto,
    sampling_from_proto,
)

SAMPLING = SamplingParams(
    max_tokens=7,
    min_tokens=1,
    temperature=0.7,
    top_p=0.9,
    top_k=5,
    min_p=0.05,
    seed=2**64 - 1,
    presence_penalty=0.1,
    frequency_penalty=-0.2,
    repetition_penalty=1.1,
    logit_bias={3: -100.0},
    logprobs=0,
    prompt_logprobs=3,
    stop_token_ids=(9, 8),
    ignore_eos=True,
)
STRUCTURED = SamplingParams(
    structured=StructuredOutput(kind="json_schema", definition='{"type": "object"}')
)


def test_every_sampling_value_is_sent() -> None:
    sent = sampling_to_proto(SAMPLING)
    for field in worker_pb2.SamplingParams.DESCRIPTOR.fields:
        value = getattr(sent, field.name)
        wanted = getattr(SAMPLING, field.name)
        if field.name == "logit_bias":
            assert dict(value) == wanted
        elif field.name == "stop_token_ids":
            assert tuple(value) == wanted
        elif field.name != "structured":
            assert value == wanted, field.name
    assert sent.HasField("logprobs")
    structured = sampling_to_proto(STRUCTURED).structured
    assert STRUCTURED.structured is not None
    assert (structured.kind, structured.definition) == (
        STRUCTURED.structured.kind,
        STRUCTURED.structured.definition,
    )
    assert not sampling_to_proto(SamplingParams()).HasField("logprobs")
    assert not sampling_to_proto(SamplingParams()).HasField("structured")


def test_a_worker_reads_what_the_router_sent() -> None:
    for sampling in (SAMPLING, STRUCTURED, SamplingParams()):
        assert sampling_from_proto(sampling_to_proto(sampling)) == sampling


def test_logprobs_of_a_prompt_come_in_messages_of_bounded_size() -> None:
    count = PROMPT_LOGPROBS_AT_ONCE + 3
    told = PromptLogprobs(
        first=5,
        logprobs=[-0.5 * i for i in range(count)],
        ranks=list(range(count)),
        num_top=2,
        top_ids=list(range(2 * count)),
        top_logprobs=[-0.25 * i for i in range(2 * count)],
    )
    messages = list(prompt_logprobs_to_proto(told, request_id="r", attempt=2))
    runs = [prompt_run_from_proto(message) for message in messages]
    assert len(runs) == 2 and {(run.request_id, run.attempt) for run in runs} == {("r", 2)}
    assert join_prompt_logprobs([run.logprobs for run in runs]) == told
    messages[0].top_ids.pop()
    with pytest.raises(ProtocolViolation, match="incomplete"):
        prompt_run_from_proto(messages[0])


def submit(remaining_s: float = 1.5) -> worker_pb2.Submit:
    return submit_to_proto(
        root_hash=b"r" * 16,
        request_id="r",
        attempt=2,
        prompt_ids=[1, 2, 3],
        output_ids=[4],
        block_hashes=[b"a" * 16, b"b" * 16],
        sampling=SAMPLING,
        remaining_s=remaining_s,
    )


def test_submit_names_the_other_leg() -> None:
    peer = make_info("prefill", "p-7", epoch=99, kv_address="h:5")
    message = with_phase(submit(), Phase.IMPORT, peer).submit
    imported = getattr(message, "import")
    assert (imported.prefill_worker_id, imported.prefill_epoch, imported.kv_address) == (
        "p-7", 99, "h:5",
    )  # fmt: skip
    assert message.WhichOneof("phase") == "import"
    assert with_phase(submit(), Phase.EXPORT, peer).submit.export.decode_worker_id == "p-7"
    assert with_phase(submit(), Phase.LOCAL, None).submit.WhichOneof("phase") == "local"
    assert message.block_hashes == b"a" * 16 + b"b" * 16
    assert (list(message.prompt_ids), list(message.output_ids)) == ([1, 2, 3], [4])


@pytest.mark.parametrize(("left", "sent"), [(1.5, 1500), (-3.0, 1), (1e9, 2**32 - 1)])
def test_time_left_fits_the_wire(left: float, sent: int) -> None:
    assert submit(left).deadline_ms == sent


def test_logprobs_must_match_the_tokens() -> None:
    entry = worker_pb2.TokenLogprobs(
        logprob=-1.0, top=[worker_pb2.TokenLogprob(token_id=4, logprob=-1.0)]
    )
    batch = token_batch([TokenRow("r", 2, 3, [4], [entry], 1), TokenRow("s", 1, 0, [7])])
    expected = Token(3, 4, TokenLogprobs(-1.0, ((4, -1.0),)))
    runs = [("r", 2, [expected], 1), ("s", 1, [Token(0, 7)], None)]
    assert token_runs_from_proto(batch) == runs
    batch.notes[0].logprobs.append(entry)
    with pytest.raises(ProtocolViolation, match="2 logprobs came with 1 tokens"):
        token_runs_from_proto(batch)


def test_unknown_words_fail_closed() -> None:
    end = leg_end_from_proto(worker_pb2.Finished(error_code="from the future"))
    assert (end.reason, end.error_code, end.times) == (
        FinishReason.FAILED, ErrorCode.INTERNAL, None,
    )  # fmt: skip
    assert load_from_proto(worker_pb2.LoadReport()).state is WorkerState.STALLED
    with pytest.raises(ProtocolViolation):
        info_from_proto(worker_pb2.WorkerDescription(worker_id="w", protocol=PROTOCOL))
    with pytest.raises(ProtocolViolation):
        cache_from_proto(worker_pb2.CacheEvents(stored=b"short"))


def test_cache_events_name_the_tier() -> None:
    a, b, c = (bytes([value]) * 16 for value in range(3))
    host = worker_pb2.TierChange(tier=worker_pb2.CACHE_TIER_HOST, stored=a + b, removed=c)
    unknown = worker_pb2.TierChange(stored=c)
    change = cache_from_proto(worker_pb2.CacheEvents(removed=a, lower=[host, unknown]))
    assert (change.stored, change.removed) == ([], [a])
    assert (change.host_stored, change.host_removed) == ([a, b], [c])
    host.stored = b"short"
    with pytest.raises(ProtocolViolation):
        cache_from_proto(worker_pb2.CacheEvents(lower=[host]))


def test_matched_stop_of_zero_is_not_absence() -> None:
    assert leg_end_from_proto(worker_pb2.Finished(matched_stop=0)).matched_stop == 0
    assert leg_end_from_proto(worker_pb2.Finished()).matched_stop is None


def test_links_that_make_no_sense_are_left_out() -> None:
    report = worker_pb2.LoadReport(state=worker_pb2.WORKER_STATE_READY)
    for name, rate in {"p0": 2e9, "p1": 0.0, "p2": float("inf"), "p3": float("nan")}.items():
        report.links.add(prefill_worker_id=name, bytes_per_s=rate)
    report.links.add(prefill_worker_id="p1", failure="x" * 1000, prefill_epoch=7)
    load = load_from_proto(report)
    assert load.link_bytes_per_s == {"p0": 2e9}
    assert load.link_failures == {"p1": (7, "x" * 512)}


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e-300, float("inf"), float("nan")])
def test_measurements_that_make_no_sense_are_left_out(rate: float) -> None:
    report = worker_pb2.LoadReport(state=worker_pb2.WORKER_STATE_READY)
    report.tiers.add(tier=worker_pb2.CACHE_TIER_UNSPECIFIED, bytes_per_s=3e9)
    report.tiers.add(tier=worker_pb2.CACHE_TIER_HOST, bytes_per_s=rate)
    assert load_from_proto(report).host_bytes_per_s == 0
    report.prefill_tokens_per_s = report.decode_step_s = rate
    load = load_from_proto(report)
    assert (load.prefill_tokens_per_s, load.decode_step_s) == (0, 0)
    report.tiers.add(tier=worker_pb2.CACHE_TIER_HOST, bytes_per_s=2e9)
    assert load_from_proto(report).host_bytes_per_s == 2e9


def test_place_of_a_worker_is_read() -> None:
    layout = worker_pb2.KvLayout(block_size=16)
    place = worker_pb2.Place(zone="z", rack="r", host="h")
    described = worker_pb2.WorkerDescription(
        role=worker_pb2.ROLE_PREFILL, layout=layout, place=place, protocol=PROTOCOL
    )
    assert info_from_proto(described).place == Place(zone="z", rack="r", host="h")


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        (("z", "r", "h"), ("z", "r", "h"), Distance.HOST),
        (("z", "r", "h"), ("z", "r", "i"), Distance.RACK),
        (("z", "r", "h"), ("z", "s", "h"), Distance.ZONE),
        (("z", "r", "h"), ("y", "r", "h"), Distance.APART),
        (("", "", "h"), ("", "", "h"), Distance.HOST),
        (("z", "", ""), ("z", "r", ""), Distance.ZONE),
        (("", "", ""), ("z", "r", "h"), Distance.UNKNOWN),
    ],
)
def test_distance_is_the_smallest_thing_shared(
    one: tuple[str, str, str], other: tuple[str, str, str], distance: Distance
) -> None:
    places = [Place(zone=zone, rack=rack, host=host) for zone, rack, host in (one, other)]
    assert places[0].distance(places[1]) is distance
    assert places[1].distance(places[0]) is distance
