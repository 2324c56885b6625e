"""Checkpoint folders: read, checked, and mapped to the engine's names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sjd_engine.errors import CheckpointError
from sjd_engine.models.block import BlockConfig, Transformer


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
    """All tensors of a safetensors file. Raises: CheckpointError where it is missing, truncated or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; the checkpoint is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def assign(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give `module` exactly `tensors`.

    Raises: CheckpointError naming the missing, unknown or misshapen ones; the module is then unchanged.
    """
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
    problems = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name}: expected {list(wanted[name])}, got {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tuple(tensor.shape) != wanted[name]
    ]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{path}: the weights do not fit config.json: {listed}")
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)


def block_config(config: dict[str, Any], path: Path) -> BlockConfig:
    """The block of a Hugging Face Qwen2 config. Raises: CheckpointError where a key is missing or unsupported."""
    if config.get("hidden_act", "silu") != "silu" or config.get("use_sliding_window", False):
        raise CheckpointError(f"{path}: expected hidden_act silu and no sliding window")
    rope = config.get("rope_parameters") or {}
    try:
        return BlockConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            max_positions=config["max_position_embeddings"],
            rope_theta=float(config["rope_theta"] if "rope_theta" in config else rope["rope_theta"]),
            norm_eps=config["rms_norm_eps"],
            qkv_bias=True,
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: config.json lacks {error}") from None


def load_qwen2(
    folder: Path, config: dict[str, Any], *, first_code: int, num_codes: int, dtype: torch.dtype
) -> Transformer:
    """A Qwen2 checkpoint as the engine's transformer, its head cut to the image rows.

    Args:
        folder: holds model.safetensors with Hugging Face's names.
        config: its config.json.
        first_code: vocabulary row of image code 0.
        num_codes: V.
        dtype: of everything but the head, which is float32.
    Raises: CheckpointError.
    """
    path = folder / "model.safetensors"
    tensors = read_tensors(path)

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise CheckpointError(f"{path}: missing {name}; expected the Qwen2 layout")
        return tensors.pop(name)

    block = block_config(config, folder)
    embedding = take("model.embed_tokens.weight")
    tied = tensors.pop("lm_head.weight", embedding) if config.get("tie_word_embeddings") else None
    head = take("lm_head.weight") if tied is None else tied
    if first_code + num_codes > len(head):
        raise CheckpointError(f"{path}: expected {first_code + num_codes} rows in the head, got {len(head)}")
    state = {"embedding": embedding, "norm": take("model.norm.weight")}
    for i in range(block.num_layers):
        source, target = f"model.layers.{i}", f"blocks.{i}"
        attention = [f"{source}.self_attn.{x}_proj" for x in "qkv"]
        state |= {
            f"{target}.norm1": take(f"{source}.input_layernorm.weight"),
            f"{target}.norm2": take(f"{source}.post_attention_layernorm.weight"),
            f"{target}.wqkv": torch.cat([take(f"{name}.weight") for name in attention]),
            f"{target}.bqkv": torch.cat([take(f"{name}.bias") for name in attention]),
            f"{target}.wo": take(f"{source}.self_attn.o_proj.weight"),
            f"{target}.w_gate_up": torch.cat([take(f"{source}.mlp.{x}_proj.weight") for x in ("gate", "up")]),
            f"{target}.w_down": take(f"{source}.mlp.down_proj.weight"),
        }
    state["head"] = head[first_code : first_code + num_codes].float()
    with torch.device("meta"):
        model = Transformer(block, config["vocab_size"], num_codes)
    assign(model, {**state, **tensors}, path)
    return model.cast(dtype)
