"""LoRA: low-rank adapters beside the matrices of the blocks, by peft.

Source: Hu et al., "LoRA: low-rank adaptation of large language models" (arXiv 2106.09685).
"""

from typing import Any

import torch

from sjd_engine.models.block import Transformer

MATRICES = ["wo", "wqkv", "w_down", "w_gate_up"]


def add_adapters(transformer: Transformer, rank: int, seed: int) -> Any:
    """Put adapters into the transformer and freeze everything else. They change nothing until they are trained.

    Args:
        rank: of every adapter, >= 1.
        seed: of the half that does not begin at zero.
    Returns: what `merge_adapters` takes.
    Raises: RuntimeError without peft; ValueError for a bad rank.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise RuntimeError("lora: needs peft; pip install 'sjd-engine[train]'") from None
    if rank < 1:
        raise ValueError(f"lora: expected a rank >= 1, got {rank}")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=MATRICES)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoraModel(transformer, config, "sjd2")


def merge_adapters(adapters: Any) -> None:
    """Add what the adapters have learnt to the matrices, and take them away."""
    adapters.merge_and_unload()
