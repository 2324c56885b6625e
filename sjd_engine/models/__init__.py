"""Model families and how a checkpoint finds its own."""

from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from sjd_engine.errors import CheckpointError
from sjd_engine.models import hub
from sjd_engine.models.base import ImageModel
from sjd_engine.models.checkpoint import Checkpoint, LoadedModel
from sjd_engine.models.draft_head import load_draft_head
from sjd_engine.models.fine_tuned import base_of, fine_tune
from sjd_engine.models.neighbours import load_neighbours

__all__ = ["ImageModel", "load_from_transformers", "load_model"]

BUNDLED = {"emoji", "emoji-sjd2"}


def checkpoint_folder(name: str | Path) -> Path:
    """Where a checkpoint lies: a bundled model, a folder, one file of tensors, or what the Hugging Face hub has by that
    name, fetched. Raises: CheckpointError where there is none."""
    if str(name) in BUNDLED:
        return Path(str(files("sjd_engine") / "assets" / str(name)))
    path = Path(name)
    if path.exists():
        return path
    if hub.is_id(str(name)):
        return hub.fetch(str(name))
    raise CheckpointError(
        f"model: {str(name)!r} is neither a bundled model ({', '.join(sorted(BUNDLED))}) nor a checkpoint folder or "
        "file, nor a hub id like 'deepseek-ai/Janus-Pro-1B'"
    )


def load_model(name: str | Path, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """Load a checkpoint; its family is read from its files, or from those of the model that it was fine-tuned from.

    Raises: CheckpointError where the files are missing, incomplete, damaged or of no known family.
    """
    path = checkpoint_folder(name)
    base = base_of(path) if path.is_dir() else None
    if base is None:
        return load_base(name, path, device, dtype)
    if base_of(checkpoint_folder(base)) is not None:
        raise CheckpointError(f"{path}: expected a base model that is no fine-tuned one itself, got {base}")
    model = load_base(base, checkpoint_folder(base), device, dtype)
    fine_tune(model, path)
    return model


def load_base(name: str | Path, path: Path, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """Load a checkpoint that lies at `path` and has everything. Raises: see `load_model`."""
    return read(Checkpoint(path, None if Path(name).exists() else str(name)), device, dtype)


def load_from_transformers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """The family's own model with the weights of one that transformers has loaded, which are copied; the tokenizer is
    read where that was loaded from. Raises: CheckpointError where that is unknown, or of no known family."""
    origin = str(getattr(model, "name_or_path", ""))
    if not origin:
        raise CheckpointError(
            f"model: {type(model).__name__} was not loaded from a checkpoint, so that its tokenizer is unknown; set "
            "model.name_or_path to a folder that holds it"
        )
    return read(LoadedModel(model, checkpoint_folder(origin)), device, dtype)


def read(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """The model of a checkpoint. Raises: CheckpointError where it is of no known family, or damaged."""
    # Here, since tokenizers and detokenizers would make the package slow to import.
    from sjd_engine.models.anole import AnoleModel
    from sjd_engine.models.emoji import EmojiModel
    from sjd_engine.models.emu3 import Emu3Model
    from sjd_engine.models.janus import JanusModel
    from sjd_engine.models.llamagen import LlamaGenModel
    from sjd_engine.models.lumina import LuminaModel
    from sjd_engine.models.simplear import SimpleARModel

    # The first that matches takes a checkpoint: Anole before Lumina-mGPT, whose files differ in little.
    families = (EmojiModel, AnoleModel, LuminaModel, JanusModel, SimpleARModel, LlamaGenModel, Emu3Model)
    for family in families:
        if family.matches(checkpoint):
            model = family(checkpoint, device, dtype)
            model.draft_head = load_draft_head(checkpoint.folder, model.transformer)
            model.neighbour_tables = load_neighbours(checkpoint.folder, model.num_codes)
            return model
    missing = "" if checkpoint.config else "no config.json, and "
    known = ", ".join(family.__module__.rpartition(".")[2] for family in families)
    remedy = "; see sjd_engine.hf.AttachedModel for others" if isinstance(checkpoint, LoadedModel) else ""
    raise CheckpointError(f"{checkpoint}: {missing}no known model family; known: {known}{remedy}")
