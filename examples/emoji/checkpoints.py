"""Training checkpoints that survive being killed at any moment."""

import os
from pathlib import Path

import torch


def save_checkpoint(path: Path, step: int, *parts) -> None:
    """Write `step` and the state of every part; the old file stays whole until the new one is."""
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "parts": [part.state_dict() for part in parts]}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, *parts) -> int:
    """Restore every part and return the step to go on from; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    print(f"resuming {path} at step {state['step']}", flush=True)
    return state["step"]
