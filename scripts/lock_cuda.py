"""Resolve the CUDA worker's image and write deploy/images/constraints-cuda.txt.

Nobody installs that image's packages here: they are gigabytes, and useless without a GPU. uv works
out from metadata alone what pip would choose for it; a test asks again and holds the answer to the
committed file. Run it after a change of constraints.txt or of the extras of that image.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.install_image import CONSTRAINTS, CUDA_CONSTRAINTS, IMAGES, ROOT, requirements

PLATFORM = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
DEADLINE_S = 120
HEAD = """\
# What the CUDA worker's image has beside constraints.txt. Made by `python scripts/lock_cuda.py`.
"""


class NoAnswer(Exception):
    """The index could not be asked."""


def resolve(*constraints: Path) -> dict[str, str]:
    """Names and versions of all that the image would hold.

    Raises:
        NoAnswer: no index can be reached.
        ValueError: nothing fulfils all requirements; the message is uv's.
    """
    uv = Path(sys.executable).with_name("uv")
    words = [f"--constraint={file}" for file in constraints]
    output = ("--no-header", "--no-annotate", "--no-config", "--quiet")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(requirements(IMAGES["worker"])))
        wanted.flush()
        done = subprocess.run(
            [str(uv), "pip", "compile", *PLATFORM, *output, *words, wanted.name],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    if done.returncode == 1:
        raise ValueError(done.stderr)
    if done.returncode:
        raise NoAnswer(done.stderr)
    return dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)


def pinned(file: Path) -> dict[str, str]:
    """Names, as indexes normalise them, and versions of a file of constraints."""
    pins = (line.split("==") for line in file.read_text().splitlines() if line[:1].isalnum())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def main() -> None:
    """Write the file."""
    known = pinned(CONSTRAINTS)
    more = {name: version for name, version in resolve(CONSTRAINTS).items() if name not in known}
    lines = (f"{name}=={version}\n" for name, version in sorted(more.items()))
    CUDA_CONSTRAINTS.write_text(HEAD + "".join(lines))
    sys.stdout.write(f"{CUDA_CONSTRAINTS.relative_to(ROOT)}: {len(more)} packages\n")


if __name__ == "__main__":
    main()
