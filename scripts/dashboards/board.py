"""One dashboard: its variables, its rows of panels, and where each panel goes on the page.

Panels show every namespace, release, pool and worker until a variable narrows them. Each variable
means "all" by matching any value, none included: where a scrape adds no such label, its variable
has no values and changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.dashboards.family import Family
from scripts.dashboards.panels import DATASOURCE, Panel

PAGE_WIDTH = 24
SCHEMA_VERSION = 39
"""Of dashboards of Grafana 10.4; newer ones bring it up to date when they load it."""
DOCS_URL = "https://github.com/diptych/diptych/blob/main/docs"
"""Where docs/ can be read; the chart and `--docs-url` put another in its place."""
RUNBOOK_URL = f"{DOCS_URL}/runbooks/{{}}.md"
TAG = "diptych"


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row of panels, laid out from left to right."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A dashboard."""

    name: str
    """File and uid; never changes, since links hold it."""
    title: str
    description: str
    rows: Sequence[Row]
    role: str = ""
    """Role whose pools and workers its variables offer; empty: all."""
    of_workers: bool = True
    """False if all it shows is of routers; then there is no pool or worker to choose."""

    @property
    def panels(self) -> list[Panel]:
        """All of them, in order."""
        return [panel for row in self.rows for panel in row.panels]

    def json(self) -> dict[str, Any]:
        """As Grafana imports it."""
        return {
            "uid": f"diptych-{self.name}",
            "title": f"Diptych / {self.title}",
            "description": self.description,
            "tags": [TAG],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "",
            "links": _LINKS,
            "annotations": {"list": []},
            "templating": {"list": self._variables()},
            "panels": self._placed(),
        }

    def _placed(self) -> list[dict[str, Any]]:
        placed: list[dict[str, Any]] = []
        y = 0
        for row in self.rows:
            place = {"h": 1, "w": PAGE_WIDTH, "x": 0, "y": y}
            placed.append(
                {
                    "id": len(placed) + 1,
                    "type": "row",
                    "title": row.title,
                    "collapsed": False,
                    "gridPos": place,
                    "panels": [],
                }
            )
            x, y, height = 0, y + 1, 0
            for panel in row.panels:
                if x + panel.width > PAGE_WIDTH:
                    x, y, height = 0, y + height, 0
                placed.append(panel.json(len(placed) + 1, x, y, RUNBOOK_URL))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return placed

    def _variables(self) -> list[dict[str, Any]]:
        own = {"role": f'="{self.role}"'} if self.role else {}
        variables = [
            {
                "name": "datasource",
                "label": "Data source",
                "type": "datasource",
                "query": "prometheus",
                "hide": 0,
                "refresh": 1,
                "current": {},
                "options": [],
            },
            _variable("namespace", "Namespace", "diptych_build_info", {}),
            _variable("release", "Release", "diptych_build_info", _matching("namespace")),
        ]
        if self.of_workers:
            shared = _matching("namespace", "release")
            metric = "diptych_worker_ready"
            variables += [
                _variable("pool", "Pool", metric, {**shared, **own}),
                _variable("worker", "Worker", metric, {**shared, **_matching("pool"), **own}),
            ]
        return variables


def selected(family: Family) -> Mapping[str, str]:
    """What the variables choose, as matchers of a metric."""
    names = ("namespace", "release", "pool", "worker")
    return {name: f"=~${name}" for name in names if name in family.labels}


def _matching(*names: str) -> dict[str, str]:
    return {name: f'=~"${name}"' for name in names}


def _variable(name: str, label: str, metric: str, matchers: Mapping[str, str]) -> dict[str, Any]:
    inside = ",".join(label + value for label, value in matchers.items())
    query = f"label_values({metric}{f'{{{inside}}}' if inside else ''}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"variable-{name}", "qryType": 1},
        "regex": "",
        "sort": 1,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "hide": 0,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
    }


_LINKS = [
    {
        "type": "dashboards",
        "title": "Diptych",
        "tags": [TAG],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    },
    {
        "type": "link",
        "title": "What to do",
        "tags": [],
        "asDropdown": False,
        "includeVars": False,
        "keepTime": False,
        "targetBlank": True,
        "icon": "doc",
        "tooltip": "Guide to these dashboards",
        "url": f"{DOCS_URL}/observability.md",
    },
]
