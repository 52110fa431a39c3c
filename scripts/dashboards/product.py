"""Every file that is built from the metric registry, by its path in the repository."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath

from scripts.dashboards.alerts import Alert, alerts
from scripts.dashboards.board import Board, selected
from scripts.dashboards.boards import (
    autoscaling,
    cache,
    decode,
    engine,
    overview,
    placement,
    prefill,
    stages,
    transfer,
)
from scripts.dashboards.promql import Source
from scripts.dashboards.recording import Recording, recordings, with_recordings
from scripts.dashboards.reference import reference
from scripts.dashboards.registry import Catalogue, build_catalogue
from scripts.dashboards.rule_file import rule_file

CHART = PurePosixPath("deploy/helm/diptych")
RULES = CHART / "rules/diptych.yaml"
REFERENCE = PurePosixPath("docs/metrics.md")


class Product:
    """Dashboards, rules and reference, each built once."""

    def __init__(self) -> None:
        own = build_catalogue()
        self.recordings: list[Recording] = recordings(own)
        self.catalogue: Catalogue = with_recordings(own, self.recordings)
        self.alerts: list[Alert] = alerts(self.catalogue)
        source = Source(self.catalogue, selector=selected)
        self.boards: list[Board] = [
            module.board(source)
            for module in (
                *(overview, stages, prefill, decode, transfer, cache),
                *(placement, autoscaling, engine),
            )
        ]

    def files(self) -> Mapping[PurePosixPath, str]:
        """Path to content."""
        return {
            **{
                CHART / f"dashboards/{board.name}.json": json.dumps(board.json(), indent=1) + "\n"
                for board in self.boards
            },
            RULES: rule_file(self.recordings, self.alerts),
            REFERENCE: reference(self.catalogue, self.recordings, self.alerts, self.boards),
        }
