"""From a checkpoint to the model that an engine runs: read, shared among processes, quantised, packed."""

from pathlib import Path

import torch
from torch import nn

from sjd_engine.models import ImageModel, load_from_transformers, load_model
from sjd_engine.models.attached import AttachedModel
from sjd_engine.models.linear import Matrix
from sjd_engine.pack import computes_bfloat16, pack
from sjd_engine.parallel import share
from sjd_engine.quantize import quantize

QUANTIZATIONS = ("int8",)


def load(
    model: str | Path | ImageModel | nn.Module,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    quantization: str | None = None,
    tensor_parallel: bool = False,
) -> ImageModel:
    """A model ready to run; see `Engine` for the arguments. A loaded ImageModel is changed, and stays on its device.
    Of a model of transformers the weights are copied, by default to its own device and in its own dtype.

    Raises: CheckpointError where it cannot be read; ValueError, TypeError for bad arguments; RuntimeError for
        tensor_parallel without a process group.
    """
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization: expected {', '.join(QUANTIZATIONS)} or None, got {quantization!r}")
    # What is cut or stored in 8 bits need not fit on the device as the files have it.
    first = torch.device("cpu") if tensor_parallel or quantization else None
    if isinstance(model, ImageModel):
        chosen, loaded = model.device, model
        if isinstance(model, AttachedModel):  # whose weights are transformers' own
            if quantization or tensor_parallel:
                raise ValueError("quantization, tensor_parallel: expected neither for an AttachedModel")
            return model
    elif isinstance(model, str | Path):
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_model(model, first or chosen, dtype or default_dtype(chosen))
    elif isinstance(model, nn.Module) and hasattr(model, "name_or_path"):  # transformers' own name for where it was
        parameter = next(model.parameters())
        chosen = torch.device(device or parameter.device)
        loaded = load_from_transformers(model, first or chosen, dtype or parameter.dtype)
    else:
        raise TypeError(
            f"model: expected a name, a checkpoint folder, an ImageModel or a model of transformers, got {model!r}"
        )
    if (quantization or tensor_parallel) and any(isinstance(part, Matrix) for part in loaded.transformer.modules()):
        raise ValueError("quantization, tensor_parallel: an engine has stored this model in its own way; load it again")
    if tensor_parallel:
        loaded.transformer = share(loaded.transformer)
    if quantization:
        quantize(loaded.transformer)
    loaded.transformer.to(chosen)
    loaded.detokenizer.to(chosen)
    pack(loaded.transformer)
    if loaded.draft_head is not None:
        pack(loaded.draft_head.to(chosen))
    return loaded


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` computes in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if computes_bfloat16() else torch.float32
