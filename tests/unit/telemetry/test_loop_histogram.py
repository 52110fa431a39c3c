from prometheus_client import CollectorRegistry, Histogram, generate_latest

from telemetry.loop_histogram import LoopHistogram

BOUNDS = (0.001, 0.5, 2)
VALUES = (0.0, 0.001, 0.0011, 0.5, 1, 2, 2.5, 100)


def test_it_shows_what_the_librarys_own_histogram_shows() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = LoopHistogram("gap_seconds", "Gaps.", "api", buckets=BOUNDS, registry=ours)
    library = Histogram("gap_seconds", "Gaps.", ["api"], buckets=BOUNDS, registry=theirs)
    for api in ("chat", "completions"):
        for value in VALUES:
            mine.labels(api).observe(value)
            library.labels(api).observe(value)
    shown, expected = (
        [line for line in generate_latest(each).decode().splitlines() if "_created" not in line]
        for each in (ours, theirs)
    )
    assert shown == expected


def test_a_series_is_there_at_zero_once_it_is_asked_for() -> None:
    registry = CollectorRegistry()
    LoopHistogram("gap_seconds", "Gaps.", "api", buckets=BOUNDS, registry=registry).labels("chat")
    labels = {"api": "chat", "le": "+Inf"}
    assert registry.get_sample_value("gap_seconds_bucket", labels) == 0
