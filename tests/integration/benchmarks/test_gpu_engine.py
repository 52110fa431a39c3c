"""A whole session on a CPU with a tiny model: every child, the file, the picture."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.gpu_engine import PARTS, Session, parse
from benchmarks.gpu_timeline import draw

TINY = ("--device", "cpu", "--shrink", "64", "--model", "tiny", "--repeats", "1")
PEER = """echo noise; test -f {models}/tiny/config.json && \
echo '{"peer": "other 1", "bench": "decode_step", "batch": 4, "seconds": 1.0}'"""


def test_session_measures_compares_and_saves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = parse([*TINY, "--out", str(out), "--order", "AB", "--peer", PEER])
    session = Session(arguments, tmp_path)
    session.run()
    assert session.troubles == []
    (path,) = out.glob("gpu-engine-*.json")
    result = json.loads(path.read_text())
    figures = result["figures"]
    assert len(figures["tiny: offline, 56 tokens out"]["samples"]) == 1
    assert figures["tiny: prefill of 64 tokens, time to first token"]["value"] > 0
    assert figures["tiny: decode step, batch 4 x 32, other 1"]["value"] == 1000
    assert "tiny: decode step, batch 4 x 32, speed over other 1" in figures
    for batch in (2, 4):
        assert 0 <= figures[f"tiny: steady decode, batch {batch} x 16, GPU idle"]["value"] <= 100
    assert len(result["details"]["profiles"]) == 2
    ElementTree.fromstring(draw(result))


def test_children_that_fail_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = parse(
        [*TINY, "limits", "--out", str(out), "--order", "BA", "--peer", "exit 7", "--peer", "true"]
    )
    session = Session(arguments, tmp_path)
    session.run()
    assert session.troubles == ["exit 7 ended with code 7", "true printed no figure"]
    (path,) = out.glob("gpu-engine-*.json")  # written before and after the limits were known
    result = json.loads(path.read_text())
    assert result["details"]["troubles"] == session.troubles
    assert any("copy" in name for name in result["figures"])


def test_time_limit_of_a_part(tmp_path: Path) -> None:
    session = Session(parse([*TINY, "limits", "--part-limit", "0.01"]), tmp_path)
    session.run()
    (trouble,) = session.troubles
    assert "time limit" in trouble
    assert session.report().figures == {}


def test_command_line() -> None:
    assert parse([]).parts == list(PARTS)
    assert parse([]).order == "A"
    assert parse(["--peer", "x"]).order == "ABA"
    assert parse(["steps"]).suffix == ["steps"]
    assert parse([*PARTS]).suffix == []
    for wrong in (["stepz"], ["--order", "ABC"]):
        with pytest.raises(SystemExit):
            parse(wrong)
