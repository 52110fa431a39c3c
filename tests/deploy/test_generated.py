"""What is made of the chart is made of what is there now; `make chart` makes it anew."""

import json
import tomllib

import pytest
import yaml

from scripts.build_chart import CHART, GOLDEN, PROFILES, ROOT, documents, render
from scripts.chart_values import UndocumentedValueError, read_values, schema_of
from tests.support.helm import kubernetes_tools


def test_schema_and_reference_are_those_of_the_values() -> None:
    for path, text in documents():
        assert (ROOT / path).read_text() == text, f"{path} is stale: run make chart"


@pytest.mark.parametrize("profile", PROFILES)
def test_golden_rendering_is_that_of_the_chart(profile: str) -> None:
    kubernetes_tools()
    assert (ROOT / GOLDEN / f"{profile}.yaml").read_text() == render(profile), "run make chart"


def test_every_profile_has_a_golden_rendering() -> None:
    folder = ROOT / CHART / "profiles"
    assert {path.stem for path in folder.glob("*.yaml")} == set(PROFILES)


def test_images_are_those_of_this_release() -> None:
    chart = yaml.safe_load((ROOT / CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]


def test_no_object_of_the_schema_takes_keys_that_nobody_reads() -> None:
    """Every object that lists its keys refuses others."""

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("properties"), dict) and "then" not in node and "if" not in node:
                lists = node.get("type") == "object"
                assert not lists or node["additionalProperties"] is False, list(node["properties"])
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(json.loads((ROOT / CHART / "values.schema.json").read_text()))


def test_key_without_a_purpose_is_refused() -> None:
    with pytest.raises(UndocumentedValueError, match=r"router\.port"):
        read_values("router:\n  port: 1\n")


def test_default_that_says_nothing_needs_a_schema() -> None:
    values = read_values("# -- Labels.\nlabels: {}\n")
    with pytest.raises(UndocumentedValueError, match="labels needs"):
        schema_of(values, (), {})


def test_comment_becomes_description_and_hint_becomes_schema() -> None:
    text = '# -- How many,\n# at least.\n# @schema {"minimum": 1}\ncount: 2\n'
    assert schema_of(read_values(text), (), {})["properties"]["count"] == {
        "type": "integer",
        "minimum": 1,
        "description": "How many, at least.",
    }
