"""Reports on disk and the tables made of them."""

import json
from pathlib import Path

import pytest

from benchmarks import report as reports
from benchmarks.report import Report
from benchmarks.table import PERFORMANCE, README, latest, number, render, section


@pytest.fixture
def without_git(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(reports, "_git", lambda *arguments: "")
    monkeypatch.delenv(reports.COMMIT, raising=False)
    monkeypatch.delenv(reports.DIRTY, raising=False)
    return monkeypatch


def gpu_report() -> Report:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0"}
    report = Report("gpu-engine-h100", {"repeats": 3}, gpu=gpu, quiet=True)
    report.add("Qwen: offline", 22_345.6, "tok/s", samples=[1.0], goal=">= 22000")
    report.add("Qwen: steady, products", 312.0, "us")
    return report


@pytest.mark.parametrize(("given", "dirty"), [("0", False), ("1", True), ("", None)])
def test_commit_of_a_copy_without_git(
    tmp_path: Path, without_git: pytest.MonkeyPatch, given: str, dirty: bool | None
) -> None:
    without_git.setenv(reports.COMMIT, "abc1234")
    without_git.setenv(reports.DIRTY, given)
    path = gpu_report().save(tmp_path / "new")
    written = json.loads(path.read_text())
    assert (written["commit"], written["dirty"]) == ("abc1234", dirty)
    assert path.name.startswith("gpu-engine-h100-2")
    assert path.name.endswith("-abc1234.json")
    assert written["machine"]["gpu"]["driver"] == "580.1"


def test_an_unknown_commit_is_called_so(without_git: pytest.MonkeyPatch) -> None:
    assert reports.revision() == ("unknown", None)


def test_what_the_environment_says_of_a_copy_comes_before_git(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {"rev-parse": "1234567", "status": " M file"}
    monkeypatch.setattr(reports, "_git", lambda verb, *rest: answers[verb])
    monkeypatch.delenv(reports.COMMIT, raising=False)
    assert reports.revision() == ("1234567", True)
    monkeypatch.setenv(reports.COMMIT, "abc")
    monkeypatch.setenv(reports.DIRTY, "0")
    assert reports.revision() == ("abc", False)


def test_gpu_table_names_gpu_goal_and_file(tmp_path: Path) -> None:
    gpu_report().save(tmp_path)
    (result,) = latest(tmp_path)
    table = section(result)
    assert "one NVIDIA H100 80GB HBM3 (driver 580.1, cuda 13.0)" in table
    assert "| Qwen: offline | 22,346 tok/s | >= 22000 |" in table
    assert f"(results/{result['file']})" in table


def test_pages_take_what_is_theirs(tmp_path: Path) -> None:
    gpu_report().save(tmp_path)
    other = Report("cpu", {}, quiet=True)
    other.add("step", 1.0, "ms")
    other.save(tmp_path)
    text = "head\n<!-- results -->\nold\n<!-- end of results -->\ntail\n"
    readme = render(README, text, latest(tmp_path))
    page = render(PERFORMANCE, text, latest(tmp_path))
    for each in (readme, page):
        assert each.startswith("head\n<!-- results -->\n\n### ")
        assert each.endswith("<!-- end of results -->\ntail\n")
        assert "old" not in each
    assert "### cpu" in readme
    assert "steady, products" in readme
    assert "### cpu" not in page
    assert "steady, products" not in page
    assert "(../benchmarks/results/gpu-engine-h100-" in page
    assert render(README, readme, latest(tmp_path)) == readme


def test_numbers() -> None:
    values = [0.0123456, 1.0789, 26.04, 999.4, 1046.2, 133_966.0, -2000.0]
    shown = ["0.0123", "1.08", "26", "999", "1,046", "133,966", "-2,000"]
    assert [number(value) for value in values] == shown


def test_figures_show_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    report = gpu_report()
    assert capsys.readouterr().out == ""
    report.show()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("22,345.600 tok/s   (goal >= 22000)")


def test_the_newest_result_of_a_name_counts(tmp_path: Path) -> None:
    for file, name, at in (
        ("a", "one", "2026-01-03"),
        ("b", "one", "2026-01-02"),
        ("c", "two", "2026-01-01"),
        ("d", "one", "2026-01-04"),
    ):
        (tmp_path / f"{file}.json").write_text(json.dumps({"name": name, "at": at}))
    assert [result["file"] for result in latest(tmp_path)] == ["d.json", "c.json"]
    (tmp_path / "d.json").unlink()
    assert [result["file"] for result in latest(tmp_path)] == ["a.json", "c.json"]
