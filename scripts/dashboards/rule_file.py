"""The rules as a file that Prometheus loads as it is, and that the chart wraps."""

from collections.abc import Sequence
from typing import Any

import yaml

from scripts.dashboards.alerts import Alert
from scripts.dashboards.board import RUNBOOK_URL
from scripts.dashboards.recording import Recording

_HEADER = """\
# Written by `make dashboards` from scripts/dashboards; edit recording.py and alerts.py there.
"""


def rule_file(recordings: Sequence[Recording], alerts: Sequence[Alert]) -> str:
    """Text of the file: one group of recording rules, one of alerts."""
    groups = [
        {
            "name": "diptych-recordings",
            "rules": [{"record": rule.name, "expr": rule.vector.text} for rule in recordings],
        },
        {"name": "diptych-alerts", "rules": [_alert(alert) for alert in alerts]},
    ]
    return _HEADER + yaml.safe_dump({"groups": groups}, sort_keys=False, width=10_000)


def _alert(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.vector.text,
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": RUNBOOK_URL.format(alert.name),
        },
    }
