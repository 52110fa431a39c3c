"""Writes the tables of benchmarks/README.md from the JSON files in benchmarks/results.

    python -m benchmarks.table

Of each benchmark the latest file counts. Text outside the two marks stays as it is.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def latest() -> list[dict[str, Any]]:
    """The newest result of each benchmark, by name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = {**json.loads(path.read_text()), "file": path.name}
        known = found.get(result["name"])
        if known is None or known["at"] < result["at"]:
            found[result["name"]] = result
    return [found[name] for name in sorted(found)]


def section(result: dict[str, Any]) -> str:
    """One benchmark's table."""
    machine = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    lines = [
        f"### {result['name']}",
        "",
        f"{result['at'][:10]}, commit `{result['commit']}`, {machine['cores']} cores of "
        f"{machine['cpu']}, Python {machine['python']}, {versions}; raw samples in "
        f"[results/{result['file']}](results/{result['file']}).",
        "",
        "| figure | value | goal |",
        "|---|---:|---|",
    ]
    for name, figure in result["figures"].items():
        lines.append(f"| {name} | {figure['value']:.3g} {figure['unit']} | {figure['goal']} |")
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """The README with its tables brought up to date."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    tables = "\n".join(section(result) for result in latest())
    return f"{head}{BEGIN}\n\n{tables}\n{END}{tail}"


def main() -> None:
    """Rewrite the file."""
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    main()
