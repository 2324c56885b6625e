"""Checkpoints from the Hugging Face hub: weights, configs and tokenizers, never code."""

import re
from pathlib import Path

from sjd_engine.errors import CheckpointError

DATA = ("*.json", "*.safetensors", "tokenizer/*", "vqgan.*")
DETOKENIZER = "vq_ds16_*.pt"  # what stands beside a single file of LlamaGen
PICKLES = ("*.bin", "*.pth")  # fetched where a repository has no safetensors


def is_id(name: str) -> bool:
    """Whether `name` looks like owner/repository, or like owner/repository/file.pt."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+\.pt)?", name) is not None


def fetch(name: str) -> Path:
    """The local copy of a repository, or of one file of it; `name` is what `is_id` accepts.

    Raises: CheckpointError where it cannot be had; RuntimeError without the package that fetches.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RuntimeError(
            f"model: {name!r} is no folder here; to fetch it from the Hugging Face hub install huggingface_hub"
        ) from None
    owner, repository, *file = name.split("/", 2)
    try:
        folder = Path(
            snapshot_download(f"{owner}/{repository}", allow_patterns=[*file, DETOKENIZER] if file else list(DATA))
        )
        if not file and not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(f"{owner}/{repository}", allow_patterns=[*DATA, *PICKLES]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model: {name!r} is no folder here, and the hub did not give it: {error}") from None
    return folder / file[0] if file else folder
