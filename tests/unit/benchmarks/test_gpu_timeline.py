"""The picture of two steps."""

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.gpu_profile import IDLE, KINDS, Kernel, summary
from benchmarks.gpu_timeline import COLOURS, draw, segments

SVG = "{http://www.w3.org/2000/svg}"


def result(*titles: str) -> dict[str, Any]:
    kernels = []
    for step in range(12):
        start = 1800.0 * step
        kernels.append(Kernel("_resolve", start, start + 2))
        for layer in range(28):
            at = start + 2 + 60 * layer
            kernels.append(Kernel("BatchDecodeWithPagedKVCacheKernel", at, at + 30))
            kernels.append(Kernel("_few_rows", at + 29, at + 60))
        kernels.append(Kernel("_pick", start + 1700, start + 1750))
    return {"details": {"profiles": dict.fromkeys(titles, summary(kernels, 12))}}


def test_picture_is_well_formed_and_says_how_idle_the_gpu_was() -> None:
    picture = draw(result("a < b & c", "another"))
    root = ElementTree.fromstring(picture)
    assert root.tag == f"{SVG}svg"
    words = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert set(KINDS) <= set(words)
    assert any(text.startswith("a < b & c: GPU idle 3.8 % over 8 steps") for text in words)
    assert any(text.startswith("another: GPU idle") for text in words)
    assert "1,800 us" in words


def test_bars_fill_the_width_and_stay_inside() -> None:
    root = ElementTree.fromstring(draw(result("one")))
    width = float(root.attrib["width"])
    bars: dict[str, list[tuple[float, float]]] = {}
    for rect in root.iter(f"{SVG}rect"):
        if rect.attrib["height"] == "34":
            left = float(rect.attrib["x"])
            bars.setdefault(rect.attrib["y"], []).append((left, float(rect.attrib["width"])))
    assert len(bars) == 2
    for parts in bars.values():
        assert min(left for left, _ in parts) == pytest.approx(24, abs=0.1)
        assert max(left + wide for left, wide in parts) == pytest.approx(width - 24, abs=0.1)
        assert sum(wide for _, wide in parts) == pytest.approx(width - 48, abs=2)
    colours = {rect.attrib["fill"] for rect in root.iter(f"{SVG}rect")}
    assert set(COLOURS.values()) <= colours


def test_picture_has_its_own_ground() -> None:
    root = ElementTree.fromstring(draw(result("one")))
    ground = next(root.iter(f"{SVG}rect")).attrib
    assert (ground["width"], ground["height"]) == (root.attrib["width"], root.attrib["height"])
    assert ground["fill"] == "#ffffff"


def test_segments_have_no_overlap_and_no_hole() -> None:
    kernels = [Kernel("_gemv", 0, 10), Kernel("_gemv", 9, 15), Kernel("_pick", 17, 30)]
    assert segments(kernels, 5, 20) == [
        ("products", 5, 15),
        (IDLE, 15, 17),
        ("sampling", 17, 20),
    ]
    assert segments([], 0, 3) == [(IDLE, 0, 3)]


def test_a_result_without_a_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="steady"):
        draw({"figures": {}})
