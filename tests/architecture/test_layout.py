"""What the house looks like: floors, sizes, names, light packages, fresh generated files."""

import ast
import filecmp
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("core", "telemetry", "rpc", "engine", "kvtransfer", "worker", "prefill", "decode"),
    *("router", "diptych"),
)
MAX_LINES = 500
FORBIDDEN_MODULES = {"utils", "helpers", "misc", "common", "util"}
FORBIDDEN_CLASSES = re.compile(r"(Manager|Helper|Handler|Util|Utils|Mixin)$|^Base[A-Z]")


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if "v1" not in path.relative_to(ROOT).parts)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


def test_imports_only_go_down() -> None:
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_stubs_are_those_of_the_sources(tmp_path: Path) -> None:
    done = run(sys.executable, "scripts/generate_stubs.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    fresh = sorted(path.name for path in (tmp_path / "rpc" / "v1").iterdir())
    committed = sorted(
        path.name for path in (ROOT / "rpc" / "v1").glob("*_pb2*") if path.suffix != ".pyc"
    )
    assert committed == fresh, "run make proto"
    _, different, broken = filecmp.cmpfiles(
        tmp_path / "rpc" / "v1", ROOT / "rpc" / "v1", fresh, shallow=False
    )
    assert not different + broken, "run make proto"


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests", "benchmarks", "scripts"), ids=shown)
def test_file_is_one_room(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_no_module_is_named_for_nothing_or_like_the_standard_library() -> None:
    for path in sources(*PACKAGES):
        name = path.stem
        assert name not in FORBIDDEN_MODULES, shown(path)
        if len(path.relative_to(ROOT).parts) == 1:
            assert name not in sys.stdlib_module_names, shown(path)
    for package in PACKAGES:
        assert package not in sys.stdlib_module_names


def test_no_class_is_named_for_nothing() -> None:
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not FORBIDDEN_CLASSES.search(node.name), f"{shown(path)}: {node.name}"


def test_package_inits_hold_a_docstring_only() -> None:
    for path in sources(*PACKAGES):
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1, f"{shown(path)} does something"
            assert ast.get_docstring(ast.parse(path.read_text())), shown(path)


def test_every_module_says_what_it_is_for() -> None:
    for path in sources(*PACKAGES, "benchmarks", "scripts"):
        text = path.read_text()
        assert not text or ast.get_docstring(ast.parse(text)), shown(path)


def test_every_package_is_typed() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file(), package


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "router.main",
            {"torch", "engine", "kvtransfer", "worker", "transformers", "nixl_cu12", "kubernetes"},
        ),
        ("prefill.main", {"torch", "transformers", "tokenizers"}),
        ("decode.main", {"torch", "transformers", "tokenizers"}),
        ("diptych.cli", {"torch", "grpc", "pydantic", "rich", "yaml", "asyncio"}),
        ("diptych.cluster.main", {"torch", "grpc", "transformers", "numpy"}),
        ("diptych.chat.main", {"torch", "grpc", "transformers", "numpy"}),
        ("diptych.planning.main", {"torch", "grpc", "transformers"}),
        ("diptych.autoscale.main", {"torch", "grpc", "transformers", "numpy", "kubernetes"}),
        ("diptych.doctor.main", {"torch", "transformers", "numpy"}),
        ("core.settings", {"torch", "grpc"}),
    ],
)
def test_entry_points_import_nothing_heavy(module: str, absent: set[str]) -> None:
    program = f"import {module}, sys; print(*(sys.modules.keys() & {absent!r}))"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_constraints_pin_everything_that_the_project_asks_for() -> None:
    pins = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, exact, version = line.partition("==")
            assert exact, f"{line} is no exact pin"
            assert "+" not in version, f"{line} can only be had from one place"
            pins.add(normalised(name))
    installed = ("router", "worker", "nixl", "dev")
    for requirement in requires("diptych") or ():
        wanted, _, marker = requirement.partition(";")
        if not marker or any(f'"{extra}"' in marker for extra in installed):
            name = re.split(r"[\[<>=~! ]", wanted, maxsplit=1)[0]
            assert normalised(name) in pins, f"{name} is not pinned: see constraints.txt"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
