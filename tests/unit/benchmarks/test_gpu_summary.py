"""Figures out of raw samples."""

from typing import Any

import pytest

from benchmarks.gpu_shapes import SHAPES
from benchmarks.gpu_summary import Summary
from benchmarks.report import Report

LIMITS = {
    "gpu": {"name": "NVIDIA H100 80GB HBM3"},
    "copy_bytes_per_s": [3.0e12, 3.1e12, 3.0e12],
    "product_flops_per_s": [790e12, 792e12, 798e12],
    "product_in_a_row_flops_per_s": [700e12],
}
LLAMA: dict[str, Any] = {
    "decode": {
        "1": {"long_s": [0.9, 0.868, 0.5], "short_s": [0.1, 0.1, 0.1]},
        "64": {"long_s": [9.304], "short_s": [7.0]},
    },
    "prefill_s": [0.2, 0.21, 0.19],
}
PEERS = [
    {"peer": "vllm", "bench": "decode_step", "batch": 64, "seconds": 0.0198},
    {"peer": "vllm", "bench": "prefill", "tokens": 8192, "seconds": 0.3},
    {"peer": "vllm", "bench": "offline", "output_tokens": 1000, "seconds": 0.05},
    {"peer": "vllm", "bench": "offline", "output_tokens": 1000, "seconds": 0.06},
    {"peer": "vllm", "bench": "offline", "output_tokens": 1000, "seconds": 0.05},
    {"peer": "vllm", "bench": "decode_step", "batch": 2, "seconds": 0.01, "model": "qwen3-8b"},
]


@pytest.fixture
def figures() -> dict[str, dict[str, Any]]:
    report = Report("gpu", {}, quiet=True)
    summary = Summary(report)
    summary.limits([LIMITS])
    offline = [{"seconds": 6.0, "tokens": 133_966}, {"seconds": 5.0, "tokens": 133_966}]
    summary.model("qwen3-0.6b", [{"offline": offline}, {"offline": offline[:1]}])
    summary.model("llama-3.1-8b", [LLAMA])
    summary.peers(PEERS)
    return report.figures


def test_decode_step_and_its_floor(figures: dict[str, dict[str, Any]]) -> None:
    title = "Llama-3.1-8B: decode step, batch 64 x 4096"
    assert figures[title]["value"] == pytest.approx(18.0)
    floor_ms = (15.009e9 + 64 * 4160 * 131_072) / 3.0e12 * 1e3
    assert figures[f"{title}, floor"]["value"] == pytest.approx(floor_ms, rel=1e-4)
    over = figures[f"{title}, over the floor"]
    assert over["value"] == pytest.approx(18.0 / floor_ms, rel=1e-4)
    assert over["goal"] == "<= 1.08"
    assert figures[f"{title}, run of 129 tokens"]["samples"] == [9.304]
    one = figures["Llama-3.1-8B: decode step, batch 1 x 4096"]
    assert one["value"] == pytest.approx((868 - 100) / 128)


def test_prefill_is_measured_against_the_product(figures: dict[str, dict[str, Any]]) -> None:
    title = "Llama-3.1-8B: prefill of 8192 tokens"
    flops = SHAPES["llama-3.1-8b"].prefill_flops(8192)
    share = figures[f"{title}, share of the product's rate"]
    assert share["value"] == pytest.approx(flops / 0.2 / 792e12)
    assert share["goal"] == ">= 0.82"
    share = figures[f"{title}, share of the rate of products in a row"]
    assert share["value"] == pytest.approx(flops / 0.2 / 700e12)
    assert figures[f"{title}, time to first token"]["samples"] == [200, 210, 190]


def test_offline_pools_rounds(figures: dict[str, dict[str, Any]]) -> None:
    rate = figures["Qwen3-0.6B: offline, 133,966 tokens out"]
    assert rate["value"] == pytest.approx(133_966 / 6)
    assert len(rate["samples"]) == 3
    share = figures["Qwen3-0.6B: offline, share of the limit"]["value"]
    limit = figures["Qwen3-0.6B: offline, limit"]["value"]
    assert share == pytest.approx(133_966 / 6 / limit)


def test_speed_over_peers_above_one_is_faster(figures: dict[str, dict[str, Any]]) -> None:
    def speed(what: str) -> Any:
        return figures[f"{what}, speed over vllm"]["value"]

    assert speed("Llama-3.1-8B: decode step, batch 64 x 4096") == pytest.approx(1.1)
    assert speed("Llama-3.1-8B: prefill of 8192 tokens") == pytest.approx(1.5)
    assert speed("Qwen3-0.6B: offline") == pytest.approx(133_966 / 6 / 20_000)
    assert figures["Qwen3-0.6B: offline, vllm"]["value"] == pytest.approx(20_000)
    assert figures["Qwen3-0.6B: offline, speed over vllm"]["goal"] == ">= 1.2"
    assert figures["Qwen3-8B: decode step, batch 2 x 4096, vllm"]["value"] == pytest.approx(10)
    assert "Qwen3-8B: decode step, batch 2 x 4096, speed over vllm" not in figures


def test_a_part_that_did_not_come_back_leaves_the_others() -> None:
    report = Report("gpu", {}, quiet=True)
    summary = Summary(report)
    summary.limits([LIMITS])
    summary.model("llama-3.1-8b", [{"decode": {"1": LLAMA["decode"]["1"]}}, {}])
    assert "Llama-3.1-8B: decode step, batch 1 x 4096" in report.figures
    assert not any("batch 64" in name or "prefill" in name for name in report.figures)
