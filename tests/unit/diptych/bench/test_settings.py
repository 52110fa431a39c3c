"""What `diptych bench` refuses, and what it takes for unsaid."""

import pytest

from core.errors import ConfigError
from core.settings import load
from diptych.bench.settings import BenchSettings
from router.settings import RouterSettings


def settings(*argv: str) -> BenchSettings:
    return load(BenchSettings, argv, prog="diptych bench", env_prefix="DIPTYCH_BENCH_")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--concurency", "3"], "Did you mean --concurrency"),
        (["--rate", "2", "--concurrency", "3"], "give one of"),
        (["--rate", "inf", "--duration", "5"], "give --requests"),
        (["--faster", "2"], "about a --trace"),
        (["--prompt-tokens", "9..3"], "a range goes upwards"),
        (["--prompt-tokens", "8..99", "--shared-prefix-tokens", "9"], "not be more than"),
        (["--trace", "x", "--shared-prefix-tokens", "9"], "says itself"),
    ],
)
def test_refusals_say_what_to_do(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(*argv)


def test_a_load_for_who_says_nothing() -> None:
    plain = settings()
    assert (plain.in_flight, plain.count) == (8, 100)
    assert settings("--rate", "inf").in_flight == 0
    assert settings("--duration", "5s").count is None
    assert settings("--trace", "x").count is None


def test_the_slo_is_the_routers() -> None:
    slo, router = settings().slo, RouterSettings.model_fields
    assert (slo.ttft_s, slo.tpot_s, slo.itl_s) == tuple(
        router[name].default for name in ("slo_ttft_s", "slo_tpot_s", "slo_itl_s")
    )
