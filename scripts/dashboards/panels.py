"""Panels of a Grafana dashboard: what each kind looks like as JSON. Only kinds built into Grafana.

Every panel has a description that says what to do when it looks bad.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scripts.dashboards.promql import Vector

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_GREEN, _YELLOW, _RED = "green", "#EAB839", "red"
_REF_IDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel and what its series are called, such as {{role}}."""

    vector: Vector
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Values from which on something is worth a look, and bad; the other way round if it falls."""

    warn: float
    bad: float

    def json(self) -> dict[str, Any]:
        """As Grafana wants them: each colour from its value up."""
        falling = self.bad < self.warn
        first, last = (_RED, _GREEN) if falling else (_GREEN, _RED)
        low, high = sorted((self.warn, self.bad))
        steps = [
            {"color": first, "value": None},
            {"color": _YELLOW, "value": low},
            {"color": last, "value": high},
        ]
        return {"mode": "absolute", "steps": steps}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A panel without its place."""

    title: str
    description: str
    kind: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 8
    height: int = 8
    steps: Steps | None = None
    colours: str = "palette-classic"
    """Grafana's name of how a value gets its colour."""
    custom: Mapping[str, Any]
    options: Mapping[str, Any]
    overrides: tuple[Mapping[str, Any], ...] = ()
    transformations: tuple[Mapping[str, Any], ...] = ()
    query_options: Mapping[str, Any]
    runbooks: tuple[str, ...] = ()
    """Names of alerts whose runbooks help here."""
    empty_when: str = ""
    """Why it may be empty in a sound system; empty: it may not."""

    def wide(self, width: int, height: int | None = None) -> "Panel":
        """The same panel in another size; the whole page is 24 wide."""
        return replace(self, width=width, height=height or self.height)

    def json(self, number: int, x: int, y: int, runbook_url: str) -> dict[str, Any]:
        """As in the dashboard's list of panels."""
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "custom": dict(self.custom),
            "color": {"mode": self.colours},
            "mappings": [],
            "thresholds": self.steps.json() if self.steps else _NO_STEPS,
        }
        note = f"\n\nMay be empty: {self.empty_when}" if self.empty_when else ""
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description + note,
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [
                {
                    "refId": _REF_IDS[index],
                    "datasource": DATASOURCE,
                    "editorMode": "code",
                    "expr": query.vector.text,
                    "legendFormat": query.legend or "__auto",
                    **self.query_options,
                }
                for index, query in enumerate(self.queries)
            ],
            "fieldConfig": {"defaults": defaults, "overrides": list(self.overrides)},
            "options": dict(self.options),
            "transformations": list(self.transformations),
            "links": [
                {
                    "title": f"Runbook: {name}",
                    "url": runbook_url.format(name),
                    "targetBlank": True,
                }
                for name in self.runbooks
            ],
        }


_NO_STEPS = {"mode": "absolute", "steps": [{"color": _GREEN, "value": None}]}
_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
_RANGE = {"range": True, "instant": False, "format": "time_series"}
_INSTANT = {"range": False, "instant": True}


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    stacked: bool = False,
    target: Query | None = None,
    steps: Steps | None = None,
    **rest: Any,
) -> Panel:
    """Lines over time; `target` is drawn dashed and red, `steps` as lines across."""
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 60 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if steps else "off"},
        "axisSoftMin": 0,
    }
    return Panel(
        title=title,
        description=description,
        kind="timeseries",
        queries=(*queries, *((target,) if target else ())),
        unit=unit,
        steps=steps,
        custom=custom,
        options={"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
        overrides=(_dashed(target.legend),) if target else (),
        query_options=_RANGE,
        **rest,
    )


def number(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str = "short",
    steps: Steps | None = None,
    **rest: Any,
) -> Panel:
    """One figure as of now, coloured by `steps`, over a small graph."""
    options = {
        "colorMode": "value" if steps else "none",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    }
    return Panel(
        title=title,
        description=description,
        kind="stat",
        queries=(query,),
        unit=unit,
        steps=steps,
        colours="thresholds",
        custom={},
        options=options,
        query_options=_RANGE,
        **{"width": 4, "height": 4, **rest},
    )


def distribution(
    title: str, description: str, query: Query, *, unit: str = "s", **rest: Any
) -> Panel:
    """A histogram over time; the query's series are its buckets."""
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme",
            "scheme": "Spectral",
            "steps": 64,
            "scale": "exponential",
            "exponent": 0.5,
            "reverse": True,
        },
        "filterValues": {"le": 1e-9},
        "legend": {"show": False},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    return Panel(
        title=title,
        description=description,
        kind="heatmap",
        queries=(Query(query.vector, "{{le}}"),),
        unit=unit,
        custom={"hideFrom": {"legend": False, "tooltip": False, "viz": False}},
        options=options,
        query_options={**_RANGE, "format": "heatmap"},
        **rest,
    )


def matrix(
    title: str,
    description: str,
    query: Query,
    *,
    rows: str,
    columns: str,
    unit: str,
    colours: str = "continuous-blues",
    **rest: Any,
) -> Panel:
    """A table of one value for each pair of two labels.

    Each cell's colour says where its value lies between the least and the largest of all.
    """
    return Panel(
        title=title,
        description=description,
        kind="table",
        queries=(query,),
        unit=unit,
        colours=colours,
        custom={
            "align": "center",
            "cellOptions": {"type": "color-background", "mode": "basic"},
            "filterable": False,
        },
        options={"showHeader": True, "cellHeight": "sm", "footer": {"show": False}},
        transformations=(
            {
                "id": "groupingToMatrix",
                "options": {"columnField": columns, "rowField": rows, "valueField": "Value"},
            },
        ),
        query_options={**_INSTANT, "format": "table"},
        overrides=(
            {
                "matcher": {"id": "byName", "options": f"{rows}\\{columns}"},
                "properties": [{"id": "custom.cellOptions", "value": {"type": "auto"}}],
            },
        ),
        **rest,
    )


def listing(
    title: str,
    description: str,
    query: Query,
    *,
    columns: Sequence[str],
    value: str = "",
    unit: str = "short",
    **rest: Any,
) -> Panel:
    """A table with a row for each series: the labels `columns`, and its value if it has a name."""
    order = {name: index for index, name in enumerate(columns)}
    hidden = {"Time": True, "__name__": True, **({} if value else {"Value": True})}
    return Panel(
        title=title,
        description=description,
        kind="table",
        queries=(query,),
        unit=unit,
        custom={"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True},
        options={"showHeader": True, "cellHeight": "sm", "footer": {"show": False}},
        transformations=(
            {
                "id": "organize",
                "options": {
                    "excludeByName": hidden,
                    "indexByName": order,
                    "renameByName": {"Value": value} if value else {},
                },
            },
        ),
        query_options={**_INSTANT, "format": "table"},
        **rest,
    )


def _dashed(name: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [
            {"id": "color", "value": {"mode": "fixed", "fixedColor": _RED}},
            {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "custom.stacking", "value": {"mode": "none", "group": "target"}},
        ],
    }
