"""Which files of a folder hold a model's weights. The loader and the digest go by it.

What lies beside them does not count: Mistral's folders have all weights a second time, under names
of its own, in consolidated.safetensors. Source: transformers' order of looking for weights.
"""

import json
from pathlib import Path

from core.errors import ConfigError

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, sorted: one, or those that an index names, or all there are.

    Raises:
        ConfigError: there is none, or the index can't be read or names a file that is not there.
    """
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    index = folder / _INDEX
    if not index.is_file():
        found = [
            file
            for file in sorted(folder.glob("*.safetensors"))
            if not file.name.startswith("consolidated")
        ]
        if not found:
            raise ConfigError(
                f"{folder} has no *.safetensors file. --load-format dummy needs none."
            )
        return found
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} can't be read as an index of weights: {error!r}.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {missing[0]}, which {_INDEX} names"
            + (f", and {len(missing) - 1} more" if missing[1:] else "")
            + "; was the download cut short?"
        )
    return files
