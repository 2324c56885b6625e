"""Training checkpoints that survive being killed at any moment."""

import os
from pathlib import Path
from typing import Any

import torch

from sjd_engine.train.sharding import rank


def save_checkpoint(path: Path, step: int, *parts: Any) -> None:
    """Write `step` and the state of every part; the old file stays whole until the new one is. Of several processes,
    which all call this, the first writes."""
    state = {"step": step, "parts": [part.state_dict() for part in parts]}
    if rank() == 0:
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)


def load_checkpoint(path: Path, *parts: Any) -> int:
    """Restore every part and return the step to go on from; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    if rank() == 0:
        print(f"resuming {path} at step {state['step']}", flush=True)
    return state["step"]
