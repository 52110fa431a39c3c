"""Make what is made of the Helm chart: `python scripts/build_chart.py [FOLDER]`.

Writes, under `FOLDER` or the repository: the chart's values.schema.json and
docs/kubernetes-values.md out of its values.yaml and the settings of each process, and what every
profile renders to (tests/deploy/golden). `make chart` runs it on the repository, tests on an empty
folder to see that what is committed is fresh.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from decode.settings import DecodeSettings
from prefill.settings import PrefillSettings
from router.settings import RouterSettings
from scripts.chart_values import Schema, Value, read_values, schema_of, settings_schema
from scripts.fetch_kubernetes_tools import fetch
from worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parent.parent
CHART = Path("deploy/helm/diptych")
SCHEMA = CHART / "values.schema.json"
REFERENCE = Path("docs/kubernetes-values.md")
GOLDEN = Path("tests/deploy/golden")
PROFILES = ("cpu", "single-node", "pd-rdma", "multinode-ep")
GOLDEN_FLAGS = (
    *("--set", "grpc.auth.token=golden", "--set", "router.apiKeys.existingSecret=golden"),
    *("--set", "metrics.dashboards.enabled=false,metrics.prometheusRule.enabled=false"),
    *("--kube-version", "1.35.0"),
)
"""Makes a rendering that is the same each time, of what the templates say: what would be random is
given, and files of the chart that go into it as they are stay out."""

_HEAD = """\
# Values of the Helm chart

Made from `deploy/helm/diptych/values.yaml` by `make chart`. [kubernetes.md](kubernetes.md) says how
to install; `helm show values deploy/helm/diptych` prints the same with its comments.
"""


def schema(values: list[Value]) -> Schema:
    """The chart's JSON schema (draft 7, which Helm 3 and 4 both read)."""
    settings = {
        name: settings_schema(cls)
        for name, cls in (
            ("router", RouterSettings),
            ("worker", WorkerSettings),
            ("prefill", PrefillSettings),
            ("decode", DecodeSettings),
        )
    }
    whole = schema_of(values, (), settings)
    model = whole["properties"]["model"]
    pool_defaults = whole["properties"]["poolDefaults"]
    pool = pool_defaults | {
        "required": ["role"],
        "properties": {
            "role": {"enum": ["prefill", "decode"], "description": "What its workers do."},
            **pool_defaults["properties"],
            "config": {"type": "object"},
        },
        "allOf": [
            {
                "if": {"properties": {"role": {"const": role}}},
                "then": {"properties": {"config": {"$ref": f"#/definitions/{role}Settings"}}},
            }
            for role in ("prefill", "decode")
        ],
    }
    # Helm hands the values of a parent chart down under this key.
    whole["properties"]["global"] = {"type": "object"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **whole,
        "definitions": {
            "model": model,
            "pool": pool,
            "prefillSettings": settings["prefill"],
            "decodeSettings": settings["decode"],
        },
    }


def reference(values: list[Value]) -> str:
    """The page of all values: a table for each top-level key."""
    tables: dict[str, list[str]] = {}
    for value in values:
        if value.is_group:
            continue
        name = ".".join(value.path)
        text = value.text or "Worker pools by name; each has `role` and any key of `poolDefaults`."
        default = json.dumps(value.default).replace("|", "\\|")
        heading = value.path[0] if len(value.path) > 1 else ""
        row = f"| `{name}` | `{default}` | {text.replace('|', chr(92) + '|')} |"
        tables.setdefault(heading, []).append(row)
    parts = [_HEAD]
    for heading, rows in tables.items():
        title = f"\n## {heading}\n" if heading else ""
        parts.append(
            "\n".join([title, "| value | default | meaning |", "|---|---|---|", *rows, ""])
        )
    return "\n".join(parts).replace("\n\n\n", "\n\n")


def render(profile: str) -> str:
    """What a profile renders to.

    Raises:
        ToolsUnavailable: there is no helm here.
        RuntimeError: helm refuses the chart; the message is its own.
    """
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [
                *(str(fetch().helm), "template", "demo", str(ROOT / CHART), *GOLDEN_FLAGS),
                *("--namespace", "llm", "--values", str(ROOT / CHART / f"profiles/{profile}.yaml")),
            ],
            env={"HELM_CACHE_HOME": home, "HELM_CONFIG_HOME": home, "HELM_DATA_HOME": home},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"helm refuses profile {profile}: {done.stderr}")
    return done.stdout


def documents() -> Iterator[tuple[Path, str]]:
    """What follows from values.yaml and the settings alone, which needs no helm."""
    values = read_values((ROOT / CHART / "values.yaml").read_text())
    yield SCHEMA, json.dumps(schema(values), indent=1) + "\n"
    yield REFERENCE, reference(values)


def build(folder: Path) -> None:
    """Write everything under `folder`."""
    for path, text in documents():
        _write(folder / path, text)
    for profile in PROFILES:
        _write(folder / GOLDEN / f"{profile}.yaml", render(profile))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
