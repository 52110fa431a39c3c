"""Generate the Python stubs of proto/ into a folder: `python scripts/generate_stubs.py [FOLDER]`.

`make proto` runs it on the repository, a test on an empty folder to see that the committed ones are
fresh. Needs the grpcio-tools version of pyproject.toml: its output loads on protobuf 6 and 7.
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(folder: Path) -> None:
    """Write the stubs under `folder`/rpc/v1.

    Raises:
        RuntimeError: protoc refuses a source; it has said why on standard error.
    """
    sources = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={folder}",
        f"--pyi_out={folder}",
        f"--grpc_python_out={folder}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused the sources of proto/")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
