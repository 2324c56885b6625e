"""Checkpoint files: found, listed and read one tensor at a time. Nothing that they hold is run."""

import json
import pickle
from argparse import Namespace
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sjd_engine.errors import CheckpointError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("model", "module", "state_dict")  # where training scripts put the weights in a pickle
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAPPED_BYTES = 64 << 20  # read before a mapped file is opened anew: what was read counts as memory in use until then


class Checkpoint:
    """The config and the tensors of a model.

    Args:
        path: a folder, or one file of tensors.
        name: what people call it; None for the name of `path`.
    """

    def __init__(self, path: Path, name: str | None = None):
        self.path, self.name = path, name or path.name
        self.folder = path if path.is_dir() else path.parent
        self._open: dict[Path, Mapping[str, Tensor]] = {}
        self._mapped_bytes = 0

    def __repr__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty where there is none. Raises: CheckpointError where it is no JSON object."""
        path = self.folder / "config.json"
        return read_json(path) if self.path.is_dir() and path.exists() else {}

    @property
    def family(self) -> str | None:
        """The family that config.json names in "image_generation", as this project's own files do."""
        return (self.config.get("image_generation") or {}).get("family")

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Every tensor's shape, from the files' headers. Raises: CheckpointError for missing or damaged files."""
        return {key: self._mapped(path)[key].shape for key, path in self._files.items()}

    @property
    def stored(self) -> "Checkpoint":
        """What the files hold, should the tensors be those of a model in memory."""
        return self

    def matrix_shape(self, key: str) -> tuple[int, int]:
        """(rows, columns) of a matrix. Raises: CheckpointError where it is missing or no matrix."""
        shape = self.shapes.get(key)
        if shape is None or len(shape) != 2:
            got = "none" if shape is None else list(shape)
            raise CheckpointError(f"{self}: missing {key}; expected a matrix, got {got}")
        return shape[0], shape[1]

    def read(self, key: str) -> Tensor:
        """A tensor, mapped from its file: copy what is kept, and let go of it before the next but a few.

        Raises: CheckpointError where it is not of floats.
        """
        tensor = self._checked(key, self._mapped(self._files[key])[key])
        self._mapped_bytes += tensor.nbytes
        if self._mapped_bytes > MAPPED_BYTES:
            self.close()
        return tensor

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{self}: {key}: expected float32, float16 or bfloat16, got {tensor.dtype}")
        return tensor

    def close(self) -> None:
        """Let go of the mapped files."""
        self._open, self._mapped_bytes = {}, 0

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, which is cut off; mapped, of any dtype."""
        return {
            key.removeprefix(prefix): self._mapped(path)[key]
            for key, path in self._files.items()
            if key.startswith(prefix)
        }

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The file of every tensor."""
        if self.path.is_file():
            return dict.fromkeys(self._mapped(self.path), self.path)
        for index in INDEXES:
            if (self.folder / index).exists():
                return self._indexed(self.folder / index)
        for name in SINGLE_FILES:
            if (self.folder / name).exists():
                return dict.fromkeys(self._mapped(self.folder / name), self.folder / name)
        raise CheckpointError(f"{self}: no {SINGLE_FILES[0]}, {SINGLE_FILES[1]} or an index of either")

    def _indexed(self, index: Path) -> dict[str, Path]:
        entries = read_json(index).get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
            raise CheckpointError(f'{index}: expected "weight_map", a file name for each tensor')
        shards = set(entries.values())
        for name in shards:
            if Path(name).name != name or name == "..":
                raise CheckpointError(f"{index}: expected names of files beside it, got {name!r}")
        held = {key: self.folder / name for name in sorted(shards) for key in self._mapped(self.folder / name)}
        lost = [key for key, name in entries.items() if held.get(key) != self.folder / name]
        if lost:
            raise CheckpointError(f"{index}: missing {lost[0]} in {entries[lost[0]]}; fetch the checkpoint again")
        return held

    def _mapped(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._open:
            self._open[path] = read_tensors(path)
        return self._open[path]


class LoadedModel(Checkpoint):
    """A model of transformers, read as if it were a checkpoint: config and tensors are those in memory. What such a
    model does not hold, a tokenizer above all, lies in the folder that it was loaded from.

    Args:
        model: a transformers.PreTrainedModel.
        folder: where it was loaded from.
    """

    def __init__(self, model: Any, folder: Path):
        super().__init__(folder)
        self._model = model

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._model.config.to_dict()

    @property
    def stored(self) -> Checkpoint:
        return Checkpoint(self.path)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """A tensor of the model itself. Raises: CheckpointError where it is not of floats, or not in memory."""
        tensor = self._checked(key, self._tensors[key])
        if tensor.is_meta:
            raise CheckpointError(f"{self}: {key} is offloaded; load the model without a device_map that does so")
        return tensor

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self._tensors.items() if key.startswith(prefix)}

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return self._model.state_dict()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: CheckpointError where the file is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; expected a checkpoint folder that holds one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of a pickle by torch.save of which only tensors and plain values are read;
    mapped, not loaded. Raises: CheckpointError where it is missing, truncated, foreign or holds anything else."""
    try:
        return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; the checkpoint is incomplete") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([Namespace]):  # the arguments of training scripts: plain values
            value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: holds more than tensors, and none of that is run ({reason})") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole file of torch.save ({error}); fetch it again") from None
    while isinstance(value, dict) and (inner := next((w for w in WRAPPERS if isinstance(value.get(w), dict)), None)):
        value = value[inner]
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors")
    return value
