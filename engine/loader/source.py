"""Where layers get their weights from: by name and shape, each exactly once.

A model pulls what it needs while it is built, so there is no second list of names to keep. What is
missing or misshapen raises at once; what nobody asked for raises at `finish`. Where a model is
shared among ranks, each takes its part here, of weights that it names by their whole shape.
"""

import copy
import math
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from core.errors import ConfigError
from core.modelfile.weight_files import weight_files
from engine.config import LoadFormat
from engine.loader.dummy import dummy_values
from engine.loader.stored import stored_weights
from engine.parallel.group import RankGroup


class WeightSource:
    """Weights of one checkpoint, converted to the dtype and device of the engine."""

    def __init__(
        self,
        names: Collection[str] | None,
        read: Callable[[str, tuple[int, ...]], torch.Tensor],
        group: RankGroup,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Wrap a way to read tensors.

        Args:
            names: every name that can be read; None: any (dummy weights).
            read: name and expected shape -> tensor, any dtype. What it returns may be mapped from
                a file, so that only the part that is used is read.
            group: whose ranks share the model.
            dtype: of what `get` returns.
            device: of what `get` returns.
        """
        self._names = names
        self._read = read
        self._group = group
        self._split: int | None = None
        self._dtype = dtype
        self._device = device
        self._taken: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Of what `get` returns."""
        return self._device

    def split(self, dim: int) -> "WeightSource":
        """The same weights, of which `get` returns this rank's part.

        Args:
            dim: of matrices. 0: rows of the output, with their biases. 1: columns of the input;
                ranks' outputs are to be summed, so rank 0 alone has the bias and the others zeros.
        """
        view = copy.copy(self)
        view._split = dim
        return view

    def get(self, name: str, *shape: int, copies: int = 1) -> torch.Tensor:
        """Take one weight.

        Args:
            name: in the checkpoint.
            shape: of the whole weight.
            copies: so many neighbouring ranks get the same part, out of fewer parts.

        Returns:
            The weight, or this rank's part: equally long on every rank, with zeros at the end
            where the size of the group does not divide the dimension.

        Raises:
            ConfigError: it is missing or has another shape.
        """
        self._require(name)
        tensor = self._read(name, shape)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"Weight {name} has shape {list(tensor.shape)}; config.json asks for {list(shape)}."
            )
        self._taken.add(name)
        if self._split is not None and self._group.size > 1:
            tensor = self._part(tensor, self._split, copies)
        return tensor.to(device=self._device, dtype=self._dtype)

    def skip(self, name: str) -> None:
        """Leave a weight to another rank.

        Raises:
            ConfigError: it is missing.
        """
        self._require(name)
        self._taken.add(name)

    def _require(self, name: str) -> None:
        if self._names is not None and name not in self._names:
            raise ConfigError(f"The checkpoint lacks the weight {name}, which the model needs.")

    def _part(self, tensor: torch.Tensor, dim: int, copies: int) -> torch.Tensor:
        rank = self._group.rank
        if tensor.dim() == 1 and dim == 1:
            return tensor if rank == 0 else torch.zeros_like(tensor)
        length = tensor.shape[dim]
        size = -(-length // (self._group.size // copies))
        start = min(rank // copies * size, length)
        part = tensor.narrow(dim, start, min(size, length - start))
        missing = size - part.shape[dim]
        if missing:
            shape = list(part.shape)
            shape[dim] = missing
            part = torch.cat((part, part.new_zeros(shape)), dim)
        return part.contiguous()

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Check that nothing is left over.

        Args:
            ignored: names that may be left.

        Raises:
            ConfigError: the checkpoint holds weights that the model has no place for.
        """
        left = sorted(
            name
            for name in set(self._names or ()) - self._taken - set(ignored)
            if not name.endswith(".rotary_emb.inv_freq")
        )
        if left:
            shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            raise ConfigError(
                f"The checkpoint holds {len(left)} weights that do not belong to this model: "
                f"{shown}. Is config.json the one that belongs to them?"
            )


def open_weights(
    path: Path,
    load_format: LoadFormat,
    group: RankGroup,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> WeightSource:
    """Open a checkpoint.

    Args:
        path: what `resolve_model` returned.
        load_format: `auto` goes by what `path` is.
        group: whose ranks share the model.
        dtype: weights are converted to it.
        device: weights are moved to it.
        seed: of dummy weights.

    Raises:
        ConfigError: the format does not fit the path, or files are missing or broken.
    """
    if load_format == "auto":
        load_format = "gguf" if path.suffix == ".gguf" else "safetensors"
    names: Collection[str] | None
    match load_format:
        case "dummy":
            names, read = None, _dummy_reader(seed, device)
        case "gguf":
            names, read = _gguf_reader(path)
        case "safetensors":
            names, read = _safetensors_reader(path)
    return WeightSource(names, read, group, dtype=dtype, device=device)


_Reader = Callable[[str, tuple[int, ...]], torch.Tensor]


def _safetensors_reader(path: Path) -> tuple[Collection[str], _Reader]:
    from safetensors import SafetensorError, safe_open

    if not path.is_dir():
        raise ConfigError(f"--load-format safetensors needs a folder, and {path} is not one.")
    where: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in weight_files(path):
        try:
            # The file stays mapped as long as one of its tensors lives, and pages are shared
            # between the workers of a host.
            handle: Any = safe_open(shard, framework="pt")
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                where[name] = handle
                shapes[name] = tuple(handle.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{shard} can't be read as safetensors: {error}.") from error
    stored = stored_weights(shapes)

    def read(name: str, _shape: tuple[int, ...]) -> torch.Tensor:
        found = stored[name]
        return found.of(where[found.name].get_tensor(found.name))

    return stored.keys(), read


def _gguf_reader(path: Path) -> tuple[Collection[str], _Reader]:
    from core.modelfile.gguf_file import GgufFile

    if not path.is_file():
        raise ConfigError(f"--load-format gguf needs a .gguf file, and {path} is not one.")
    gguf = GgufFile(path)

    def read(name: str, _shape: tuple[int, ...]) -> torch.Tensor:
        values = gguf.weight(name)
        # Weights that are float32 in the file come as a read-only view of it.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    return set(gguf.weight_names()), read


def _dummy_reader(seed: int, device: torch.device) -> _Reader:
    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(shape)
        own_seed = zlib.crc32(f"{seed} {name}".encode())
        return dummy_values(own_seed, math.prod(shape), device).view(shape)

    return read
