"""The model digest: 16 bytes that differ when KV of two workers would.

It seeds every block hash and is compared at each hand-over. It must be quick on hundreds of GB,
so of a large file only the size, the head (safetensors and GGUF keep their tables there) and
evenly spaced samples are read.
"""

import os
from pathlib import Path

import xxhash

from core.errors import ConfigError
from core.modelfile.weight_files import weight_files

_HEAD_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 14
_NUM_SAMPLES = 256


def model_digest(path: Path, *, dummy_seed: int | None = None) -> bytes:
    """Digest a model's configuration and weights.

    Args:
        path: what `resolve_model` returned.
        dummy_seed: seed of random weights; the files' own weights are then left out.

    Returns:
        16 bytes; equal for equal files wherever they lie.

    Raises:
        ConfigError: a file can't be read, or there are no weights.
    """
    hasher = xxhash.xxh3_128()
    try:
        if path.is_file():
            _add_file(hasher, path)
        else:
            hasher.update((path / "config.json").read_bytes())
            if dummy_seed is None:
                for shard in weight_files(path):
                    _add_file(hasher, shard)
    except OSError as error:
        raise ConfigError(f"Model files in {path} can't be read: {error}.") from error
    if dummy_seed is not None:
        hasher.update(b"dummy weights")
        hasher.update(dummy_seed.to_bytes(8, "little"))
    return hasher.digest()


def _add_file(hasher: "xxhash.xxh3_128", path: Path) -> None:
    size = path.stat().st_size
    hasher.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        hasher.update(file.read(_HEAD_BYTES))
        if size > _HEAD_BYTES:
            stride = max((size - _HEAD_BYTES) // _NUM_SAMPLES, _SAMPLE_BYTES)
            for offset in range(_HEAD_BYTES, size, stride):
                hasher.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
