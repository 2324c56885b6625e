"""TorchScript archives: their tensors, read without running anything in them.

An archive is a zip file with a pickle of the module tree and one entry for each storage. `torch.jit.load` would compile
the code beside them and run the modules' own `__setstate__`. Here the unpickler knows the few callables that tensors
need, makes a bare object of everything the archive defines itself, and refuses all else.
"""

import pickle
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sjd_engine.errors import CheckpointError

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ArchiveObject:
    """A module of the archive: its attributes are in `__dict__`."""


def rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage; what the pickle calls torch._utils._rebuild_tensor_v2."""
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if prod(size) else 0
    if min((offset, *size, *stride)) < 0 or reach >= max(len(storage), 1):
        raise pickle.UnpicklingError(f"a tensor of {list(size)} reaches past its storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


class ArchiveUnpickler(pickle.Unpickler):
    """See the module."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return ArchiveObject
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return list
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive on the CPU, named by their modules as `state_dict()` would name them.

    Buffers that the module did not keep in its state are among them.

    Raises: CheckpointError where the file is missing, damaged, no such archive, or holds other Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            tree = ArchiveUnpickler(archive, root).load()
        if not isinstance(tree, ArchiveObject):
            raise pickle.UnpicklingError(f"expected a module, got {type(tree).__name__}")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}") from None
    except Exception as error:  # a damaged zip file or pickle raises nearly anything
        raise CheckpointError(f"{path}: not a whole TorchScript archive of tensors ({error})") from None
    tensors: dict[str, Tensor] = {}
    todo, seen = [("", tree)], {id(tree)}
    while todo:
        prefix, module = todo.pop()
        for name, child in vars(module).items():
            if isinstance(child, Tensor):
                tensors[prefix + name] = child
            elif isinstance(child, ArchiveObject) and id(child) not in seen:
                seen.add(id(child))
                todo.append((f"{prefix}{name}.", child))
    return tensors
