"""A model that was fine-tuned for SJD2: a folder with what differs from its base model.

sjd2.json          {"base": a bundled model or a folder beside this one, "name": ..., "schedule": {...}}
sjd2.safetensors   "transformer." and a parameter of `Transformer`, or "denoiser." and one of `Denoiser`
"""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from sjd_engine.denoise import Denoiser, NoiseSchedule
from sjd_engine.errors import CheckpointError
from sjd_engine.files import write_json, written_whole
from sjd_engine.models.base import ImageModel
from sjd_engine.models.block import Transformer
from sjd_engine.models.checkpoint import read_json, read_tensors
from sjd_engine.models.weights import assign, refuse

CONFIG, WEIGHTS = "sjd2.json", "sjd2.safetensors"
TRANSFORMER, DENOISER = "transformer.", "denoiser."


def base_of(folder: Path) -> str | None:
    """The base model that the folder names; None where it holds no fine-tuned model. A name that is also that of a
    folder beside this one means that folder.

    Raises: CheckpointError where there is no name.
    """
    if not (folder / CONFIG).exists():
        return None
    base = read_json(folder / CONFIG).get("base")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f'{folder / CONFIG}: expected "base", the name of a model, got {base!r}')
    beside = folder.parent / base
    return str(beside) if beside.exists() else base


@torch.no_grad()
def fine_tune(model: ImageModel, folder: Path) -> None:
    """Give the base model the weights of a fine-tuned one, and its denoiser.

    Raises: CheckpointError where a file is missing, damaged or of another model; the base is then not to be used.
    """
    config, path = read_json(folder / CONFIG), folder / WEIGHTS
    tensors = read_tensors(path)
    wanted = dict(model.transformer.named_parameters())
    changed = {name.removeprefix(TRANSFORMER): t for name, t in tensors.items() if name.startswith(TRANSFORMER)}
    refuse(path, [f"unknown {name}" for name in tensors if not name.startswith((TRANSFORMER, DENOISER))])
    refuse(
        path,
        [f"unknown {name}" for name in changed if name not in wanted]
        + [
            f"{name}: expected {list(wanted[name].shape)}, got {list(tensor.shape)}"
            for name, tensor in changed.items()
            if name in wanted and wanted[name].shape != tensor.shape
        ],
    )
    try:
        schedule = NoiseSchedule(**config["schedule"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: expected the settings of a noise schedule: {error}") from None
    with torch.device("meta"):
        denoiser = Denoiser(model.transformer.config.hidden_size, schedule)
    own = {name.removeprefix(DENOISER): t.float() for name, t in tensors.items() if name.startswith(DENOISER)}
    assign(denoiser, own, path)
    for name, tensor in changed.items():
        wanted[name].copy_(tensor)
    model.denoiser, model.draft_head = denoiser.to(model.device), None  # the head was trained for the base
    model.name = str(config.get("name", folder.name))


def save_fine_tuned(model: ImageModel, folder: Path, base: str) -> None:
    """Write what `fine_tune` reads: the parameters that are trained, see `trained_parameters`, and the denoiser's.

    Args:
        base: name of the model that it was fine-tuned from, see `base_of`.
    """
    assert model.denoiser is not None
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{TRANSFORMER}{name}": p for name, p in trained_parameters(model.transformer).items()}
    tensors |= {f"{DENOISER}{name}": p for name, p in model.denoiser.named_parameters()}
    with written_whole(folder / WEIGHTS) as file:
        file.write(save({name: p.detach().contiguous() for name, p in tensors.items()}))
    config = {"base": base, "name": folder.name, "schedule": asdict(model.denoiser.schedule)}
    write_json(folder / CONFIG, config, indent=2)


def trained_parameters(transformer: Transformer) -> dict[str, nn.Parameter]:
    """Those that a fine-tuning changes, by name: blocks and final norm. Embedding and head stay, and with them what the
    embedding of a token is."""
    return {f"blocks.{name}": p for name, p in transformer.blocks.named_parameters()} | {"norm": transformer.norm}
