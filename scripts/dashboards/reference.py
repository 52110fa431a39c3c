"""docs/metrics.md: every metric with its type, labels and meaning, and where it is looked at."""

from collections.abc import Sequence

from scripts.dashboards.alerts import Alert
from scripts.dashboards.board import Board
from scripts.dashboards.family import Family
from scripts.dashboards.recording import Recording
from scripts.dashboards.registry import Catalogue

_HEAD = """\
# Metrics

Written by `make dashboards` from what the code declares; change it there. How to scrape, and what
the labels mean, is in [observability.md](observability.md).

Labels are those of the metric itself. Every metric of a worker also bears `role` and `worker`. A
histogram has the series `_bucket`, `_sum` and `_count`. "Seen on" names dashboards, and alerts that
ask for the metric."""
_ROOMS = (
    ("Routers", ("router",)),
    ("Workers: the service process", ("worker",)),
    ("Workers: the engine process", ("prefill", "decode")),
    ("The autoscaler", ("autoscaler",)),
)
_UNITS = ("seconds", "bytes", "ratio", "tokens", "blocks")


def reference(
    catalogue: Catalogue,
    recordings: Sequence[Recording],
    alerts: Sequence[Alert],
    boards: Sequence[Board],
) -> str:
    """Text of the page."""
    seen = _seen(recordings, alerts, boards)
    parts = [_HEAD]
    for title, processes in _ROOMS:
        parts.append(f"\n## {title}\n\n| metric | type | labels | meaning | seen on |")
        parts.append("|---|---|---|---|---|")
        parts += [
            _row(family, processes, seen.get(family.name, ()))
            for family in catalogue.own
            if family.kind != "recorded" and family.processes[0] in processes
        ]
    parts.append("\n## Recorded by rules\n\n| metric | labels | meaning | seen on |")
    parts.append("|---|---|---|---|")
    for rule in recordings:
        where = ", ".join(seen.get(rule.name, ()))
        labels = ", ".join(f"`{label}`" for label in sorted(rule.vector.labels))
        parts.append(f"| `{rule.name}` | {labels} | {rule.meaning} | {where} |")
    return "\n".join(parts) + "\n"


def _row(family: Family, room: Sequence[str], seen: Sequence[str]) -> str:
    labels = ", ".join(
        f"`{label}` ({', '.join(sorted(values))})" if 0 < len(values) <= 6 else f"`{label}`"
        for label, values in family.values.items()
    )
    only = [role for role in family.processes if role in room]
    meaning = family.meaning
    if room == ("prefill", "decode") and len(only) == 1:
        meaning += f" Only {only[0]} workers."
    return f"| `{family.name}` | {family.kind} | {labels} | {meaning} | {', '.join(seen)} |"


def _seen(
    recordings: Sequence[Recording], alerts: Sequence[Alert], boards: Sequence[Board]
) -> dict[str, list[str]]:
    """Metric to where it is looked at, recorded ones standing for what they are made of."""
    made_of = {rule.name: rule.vector.families for rule in recordings}
    seen: dict[str, list[str]] = {}

    def note(names: frozenset[str], where: str) -> None:
        for name in names:
            for each in (name, *made_of.get(name, ())):
                if where not in seen.setdefault(each, []):
                    seen[each].append(where)

    for board in boards:
        for panel in board.panels:
            for query in panel.queries:
                note(query.vector.families, board.title)
    for alert in alerts:
        note(alert.vector.families, f"[{alert.name}](runbooks/{alert.name}.md)")
    return seen
