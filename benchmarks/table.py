"""Writes the tables of figures in documents from the JSON files in benchmarks/results.

    python -m benchmarks.table

Of each benchmark the latest file counts. Text outside the two marks stays as it is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

ROOT = Path(__file__).parent.parent
README = ROOT / "benchmarks" / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
PAGES = (README, PERFORMANCE)
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_GPU = "gpu-engine"
_DETAILS = (", run of ", ", step in the profile")
"""Parts of names of figures that only the full tables show."""


def latest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest result of each benchmark, by name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = {**json.loads(path.read_text()), "file": path.name}
        known = found.get(result["name"])
        if known is None or known["at"] < result["at"]:
            found[result["name"]] = result
    return [found[name] for name in sorted(found)]


def section(result: dict[str, Any], link: str = "results") -> str:
    """One benchmark's table.

    Args:
        result: as `Report.save` writes it, with the name of its file.
        link: the results folder as seen from the page.
    """
    lines = [
        f"### {result['name']}",
        "",
        f"{origin(result)}; raw samples in [results/{result['file']}]({link}/{result['file']}).",
        "",
        "| figure | value | goal |",
        "|---|---:|---|",
    ]
    for name, figure in result["figures"].items():
        value = f"{number(figure['value'])} {figure['unit']}"
        lines.append(f"| {name} | {value} | {figure['goal']} |")
    return "\n".join(lines) + "\n"


def origin(result: dict[str, Any]) -> str:
    """When, of what and on what it was measured."""
    machine = result["machine"]
    commit = f"commit `{result['commit']}`" + (" and changes" if result["dirty"] else "")
    parts = [result["at"][:10], commit]
    if gpu := machine.get("gpu"):
        words = [f"{key} {gpu[key]}" for key in ("driver", "cuda") if gpu.get(key)]
        parts.append(f"one {gpu['name']}" + (f" ({', '.join(words)})" if words else ""))
    parts += [f"{machine['cores']} cores of {machine['cpu']}", f"Python {machine['python']}"]
    return ", ".join([*parts, *(f"{k} {v}" for k, v in machine["packages"].items() if v)])


def number(value: float) -> str:
    """Three digits, more for what is counted in thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def render(page: Path, text: str, results: Sequence[dict[str, Any]]) -> str:
    """A page with its tables brought up to date: README all, docs/performance.md the GPU's."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    if page == README:
        tables = [section(result) for result in results]
    else:
        found = [result for result in results if result["name"].startswith(_GPU)]
        tables = [section(_brief(result), "../benchmarks/results") for result in found]
    return f"{head}{BEGIN}\n\n" + "\n".join(tables) + f"\n{END}{tail}"


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    """Without the figures that only explain others."""
    shown = {
        name: figure
        for name, figure in result["figures"].items()
        if figure["unit"] != "us" and not any(part in name for part in _DETAILS)
    }
    return {**result, "figures": shown}


def main() -> None:
    """Rewrite the files."""
    for page in PAGES:
        page.write_text(render(page, page.read_text(), latest()))


if __name__ == "__main__":
    main()
