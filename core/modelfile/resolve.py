"""Turns what the user wrote after `--model` into a path that router and workers can open.

The launcher and each process's main call it once, before anything else touches the model.
"""

from collections.abc import Callable
from pathlib import Path

from core.errors import ConfigError

Progress = Callable[[str], None]
"""Receives one short line of text per stage of a slow operation."""

DEMO = "demo"


def silent(_line: str) -> None:
    """A Progress that shows nothing."""


def resolve_model(model: str, progress: Progress = silent) -> Path:
    """Find the folder or file behind a model name, preparing the demo model if asked for.

    Args:
        model: a folder in Hugging Face form, a `.gguf` file, or `demo`.
        progress: called while the demo model is fetched and converted.

    Returns:
        Absolute path of a folder that holds config.json, or of a .gguf file.

    Raises:
        ConfigError: nothing usable is there, or the demo model can't be fetched.
    """
    if model == DEMO:
        from core.modelfile.demo import prepare_demo_model

        return prepare_demo_model(progress)
    path = Path(model).expanduser().resolve()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        raise ConfigError(
            f"Folder {path} has no config.json. Give a folder in Hugging Face form, "
            f"a .gguf file, or `{DEMO}`."
        )
    if path.is_file() and path.suffix == ".gguf":
        return path
    what = "is not a .gguf file" if path.is_file() else "does not exist"
    raise ConfigError(
        f"Model {model!r} {what}. Give a folder in Hugging Face form, a .gguf file, or `{DEMO}`."
    )
