"""Model families and how a checkpoint finds its own."""

from importlib.resources import files
from pathlib import Path

import torch

from sjd_engine.errors import CheckpointError
from sjd_engine.models.base import ImageModel
from sjd_engine.models.emoji import EmojiModel
from sjd_engine.models.weights import read_json

__all__ = ["ImageModel", "load_model"]

FAMILIES = (EmojiModel,)
BUNDLED = {"emoji"}


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a bundled model or of a path. Raises: CheckpointError where there is none."""
    if str(name) in BUNDLED:
        return Path(str(files("sjd_engine") / "assets" / str(name)))
    folder = Path(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"model: {str(name)!r} is neither a bundled model ({', '.join(sorted(BUNDLED))}) nor a checkpoint folder"
        )
    return folder


def load_model(name: str | Path, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """Load a checkpoint; its family is read from its files.

    Raises: CheckpointError where the folder is missing, incomplete, damaged or of no known family.
    """
    folder = checkpoint_folder(name)
    config = read_json(folder / "config.json")
    for family in FAMILIES:
        if family.matches(config):
            return family(folder, device, dtype)
    raise CheckpointError(
        f"{folder}: no known model family; known: {', '.join(f.__module__.rsplit('.', 1)[-1] for f in FAMILIES)}"
    )
