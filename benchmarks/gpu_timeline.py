"""Draws the kernels of two decode steps in a row, from the file that a benchmark wrote.

    python -m benchmarks.gpu_timeline RESULT.json docs/images/decode-step.svg

For each profile a bar of both steps and, magnified, the moment where one ends and the next begins.
The picture brings its own light ground, so it reads the same on a dark page.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.gpu_profile import IDLE, KINDS, Kernel, coverage, kind_of, unpack

COLOURS = {
    "attention": "#3b6fb6",
    "products": "#e08b2d",
    "norms and other": "#8a8f98",
    "sampling": "#8e5bb5",
    "copies": "#2f9e77",
    IDLE: "#d62839",
}
_WIDTH, _MARGIN, _BAR = 1100, 24, 34
_PANEL = 196
"""Height of one profile."""
_HEAD = 64
_MAGNIFIED_US = 120.0
_FONT = "font-family='system-ui, Segoe UI, Helvetica, Arial, sans-serif'"
_INK, _PALE = "#1f2328", "#59636e"


def draw(result: dict[str, Any]) -> str:
    """The picture of all profiles in a result.

    Raises:
        ValueError: there is none.
    """
    profiles = result.get("details", {}).get("profiles", {})
    if not profiles:
        raise ValueError("The file holds no profile: run benchmarks.gpu_engine with part steady.")
    height = _HEAD + _PANEL * len(profiles)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' "
        f"width='{_WIDTH}' height='{height}' role='img' {_FONT}>",
        "<title>Kernels of two decode steps, and the GPU's idle share</title>",
        f"<rect width='{_WIDTH}' height='{height}' rx='8' fill='#ffffff' stroke='#d1d9e0'/>",
        *_legend(),
    ]
    for index, (title, profile) in enumerate(profiles.items()):
        parts += _panel(title, profile, _HEAD + index * _PANEL)
    return "\n".join([*parts, "</svg>", ""])


def segments(kernels: Sequence[Kernel], begin: float, end: float) -> list[tuple[str, float, float]]:
    """The window as (kind, start, end) without overlap or hole; neighbours of a kind are one."""
    found: list[tuple[str, float, float]] = []

    def put(kind: str, start: float, stop: float) -> None:
        if stop <= start:
            return
        if found and found[-1][0] == kind:
            start = found.pop()[1]
        found.append((kind, start, stop))

    reached = begin
    for kernel in kernels:
        start, stop = max(kernel.start, reached), min(kernel.end, end)
        if stop <= start:
            continue
        put(IDLE, reached, start)
        put(kind_of(kernel.name), start, stop)
        reached = stop
    put(IDLE, reached, end)
    return found


def _legend() -> Iterator[str]:
    x = _MARGIN
    for kind in KINDS:
        yield f"<rect x='{x}' y='22' width='14' height='14' rx='2' fill='{COLOURS[kind]}'/>"
        yield _text(x + 20, 34, kind, size=14)
        x += 44 + 8 * len(kind)


def _panel(title: str, profile: dict[str, Any], y: float) -> Iterator[str]:
    timeline = profile["timeline"]
    kernels, window = unpack(timeline), timeline["window_us"]
    border = timeline["step_begins_us"]
    here = coverage(kernels, 0.0, window).idle_share
    about = (
        f"GPU idle {100 * profile['idle_share']:.1f} % over {profile['steps']} steps of "
        f"{profile['step_us']:,.0f} us, {100 * here:.1f} % in these two"
    )
    yield _text(_MARGIN, y + 14, f"{title}: {about}", size=15, weight=600)
    half = min(_MAGNIFIED_US, window / 2) / 2
    first = min(max(0.0, border - half), window - 2 * half)
    scale = (_WIDTH - 2 * _MARGIN) / window
    left, right = (_MARGIN + scale * at for at in (first, first + 2 * half))
    top, low = y + 24 + _BAR, y + 104
    for near, far in ((left, _MARGIN), (right, _WIDTH - _MARGIN)):
        yield (
            f"<line x1='{near:.1f}' y1='{top}' x2='{far}' y2='{low}' stroke='{_PALE}' "
            "stroke-dasharray='3 3'/>"
        )
    yield from _bar(kernels, 0.0, window, y + 24)
    yield from _bar(kernels, first, first + 2 * half, low, outlined=True)


def _bar(
    kernels: Sequence[Kernel], begin: float, end: float, y: float, *, outlined: bool = False
) -> Iterator[str]:
    scale = (_WIDTH - 2 * _MARGIN) / (end - begin)

    def at(time: float) -> float:
        return _MARGIN + (time - begin) * scale

    for kind, start, stop in segments(kernels, begin, end):
        yield (
            f"<rect x='{at(start):.2f}' y='{y}' width='{(stop - start) * scale:.2f}' "
            f"height='{_BAR}' fill='{COLOURS[kind]}'/>"
        )
    if outlined:  # where each kernel starts, for neighbours of one kind
        for kernel in kernels:
            if begin < kernel.start < end:
                x = at(kernel.start)
                yield (
                    f"<line x1='{x:.2f}' y1='{y}' x2='{x:.2f}' y2='{y + _BAR}' "
                    "stroke='#ffffff' stroke-width='0.8'/>"
                )
    gap = _tick_gap(end - begin)
    tick = -(-begin // gap) * gap
    while tick <= end:
        x = at(tick)
        low = y + _BAR
        yield f"<line x1='{x:.1f}' y1='{low}' x2='{x:.1f}' y2='{low + 4}' stroke='{_PALE}'/>"
        yield _text(x, y + _BAR + 17, f"{tick:,.0f} us", size=11, anchor="middle", colour=_PALE)
        tick += gap


def _tick_gap(span: float) -> float:
    gap = 1.0
    for factor in (2, 2.5, 2) * 8:
        if span / gap <= 12:
            break
        gap *= factor
    return gap


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: int,
    weight: int = 400,
    anchor: str = "start",
    colour: str = _INK,
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='{colour}' stroke='#ffffff' stroke-width='3' "
        f"paint-order='stroke'>{escape(words)}</text>"
    )


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("result", type=Path, help="JSON file of benchmarks.gpu_engine")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_text(draw(json.loads(arguments.result.read_text())))


if __name__ == "__main__":
    main()
