"""Idle shares, time by kind, and what is kept of a profile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu_profile import (
    KINDS,
    Kernel,
    coverage,
    kind_of,
    pack,
    short_name,
    step_starts,
    summary,
    unpack,
)

KERNELS = st.lists(
    st.builds(
        lambda name, start, duration: Kernel(name, start, start + duration),
        st.sampled_from(["_resolve", "_few_rows", "_pick", "Memcpy HtoD"]),
        st.integers(0, 60),
        st.integers(0, 20),
    ),
    max_size=12,
).map(lambda kernels: sorted(kernels, key=lambda kernel: (kernel.start, kernel.end)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<int, 4>(int)", "attention"),
        ("void flashinfer::PrefillWithKVCacheKernel<cutlass::gemm::X>(int)", "attention"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<4u>(float*)", "attention"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_TNT", "products"),
        ("_few_rows", "products"),
        ("_gemv", "products"),
        ("_chunk_stats", "sampling"),
        ("_pick", "sampling"),
        ("_prepare_qkv", "norms and other"),
        ("_rms_norm", "norms and other"),
        ("void at::native::index_elementwise_kernel<128, 4>(int)", "norms and other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(short_name(name)) == kind
    assert kind in KINDS


def test_short_names_lose_templates_and_parameters() -> None:
    assert short_name("void at::native::copy<float, at::Tensor<3>>(int, float*)") == (
        "at::native::copy"
    )


def test_a_gap_is_idle_and_an_overlap_belongs_to_the_first() -> None:
    kernels = [
        Kernel("_few_rows", 0, 10),
        Kernel("_pick", 8, 14),  # starts early, waits, ends later
        Kernel("_resolve", 9, 12),  # within the one before
        Kernel("_few_rows", 16, 20),
    ]
    found = coverage(kernels, 0, 20)
    assert found.kinds == {"products": 14, "sampling": 4, "norms and other": 0}
    assert found.idle == 2
    assert found.idle_share == pytest.approx(0.1)
    assert found.counts == {"_few_rows": 2, "_pick": 1, "_resolve": 1}


def test_a_window_cuts_kernels_and_counts_its_edges_as_idle() -> None:
    found = coverage([Kernel("_gemv", 0, 10), Kernel("_gemv", 12, 40)], 8, 20)
    assert (found.window, found.idle, found.kinds) == (12, 2, {"products": 10})
    assert coverage([], 0, 5).idle_share == 1
    assert coverage([Kernel("_gemv", 2, 3)], 0, 5).idle == 4


@given(KERNELS, st.integers(0, 40), st.integers(1, 40))
def test_every_moment_counts_once(kernels: list[Kernel], begin: int, length: int) -> None:
    end = begin + length
    found = coverage(kernels, begin, end)
    busy = {
        moment
        for kernel in kernels
        for moment in range(int(kernel.start), int(kernel.end))
        if begin <= moment < end
    }
    assert found.idle == length - len(busy)
    assert sum(found.kinds.values()) == len(busy) == sum(found.kernels.values())


def decode_steps(count: int, *, marker: str = "_resolve", gap: float = 5) -> list[Kernel]:
    """Steps of 100 us: the marker, two layers, a gap at the end."""
    kernels = []
    for step in range(count):
        start = 1000.0 + 100 * step
        kernels += [
            Kernel(marker, start, start + 5),
            Kernel("_few_rows", start + 5, start + 45),
            Kernel("_few_rows", start + 44, start + 100 - gap),
        ]
    return kernels


@pytest.mark.parametrize("marker", ["_resolve", "a_new_name"])
def test_summary_of_steady_steps(marker: str) -> None:
    found = summary(decode_steps(16, marker=marker), 16)
    assert found["step_us"] == 100
    assert found["idle_share"] == pytest.approx(0.05)
    assert found["idle_shares"] == pytest.approx([0.05] * found["steps"])
    assert found["steps"] == 11  # of 15 whole ones the first quarter is left out
    assert found["kinds_us"] == {"norms and other": 5, "products": 90}
    assert found["kernels"]["_few_rows"] == {"us": 90, "launches": 2}
    timeline = found["timeline"]
    assert (timeline["window_us"], timeline["step_begins_us"]) == (200, 100)
    assert len(unpack(timeline)) == 6


def test_a_step_that_the_profiler_held_up_counts_as_one_of_many() -> None:
    kernels = [
        kernel
        if kernel.start < 1900
        else kernel._replace(start=kernel.start + 9e4, end=kernel.end + 9e4)
        for kernel in decode_steps(16)
    ]
    found = summary(kernels, 16)
    assert (found["step_us"], found["idle_share"]) == (100, pytest.approx(0.05))
    assert max(found["idle_shares"]) > 0.99


def test_summary_of_too_few_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="2 steps were told apart"):
        summary(decode_steps(2), 2)
    with pytest.raises(ValueError, match="0 steps"):
        summary([], 60)


def test_marker_is_preferred_over_other_kernels_that_run_once() -> None:
    kernels = [Kernel("Memcpy HtoD", 1.0, 2.0), *decode_steps(1)]
    assert step_starts(kernels, 1) == [1000.0]


def test_packed_timeline_comes_back() -> None:
    kernels = decode_steps(3)
    timeline = pack(kernels, 1000.0, 1200.0, 1100.0)
    assert unpack(timeline) == [
        Kernel(k.name, k.start - 1000, k.end - 1000) for k in kernels if k.start < 1200
    ]
