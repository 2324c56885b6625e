"""From the tensors of a checkpoint to the parameters of the engine's modules.

A layout says, parameter by parameter, which tensors stand in it one below the other and what is done to each: joined
products of queries, keys and values, heads of another order, image rows cut from a head. It is checked against the
files' headers before memory is taken, and followed one tensor at a time, so that loading needs little more memory than
the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sjd_engine.errors import CheckpointError
from sjd_engine.models.block import BlockConfig, Transformer
from sjd_engine.models.checkpoint import Checkpoint

MAX_SIZE = 1 << 22  # of anything a config names; one that asks for more is damaged


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter: `change` of the tensors that are called `keys`."""

    keys: tuple[str, ...]
    change: Callable[..., Tensor]

    @staticmethod
    def of(key: str, *changes: Callable[[Tensor], Tensor]) -> "Piece":
        """One tensor, and what is done to it in turn."""

        def change(tensor: Tensor) -> Tensor:
            for step in changes:
                tensor = step(tensor)
            return tensor

        return Piece((key,), change)


Layout = dict[str, Sequence[Piece]]


# ------------------------------------------------------------------------------------------------------------- loading


def load(
    module: nn.Module, layout: Layout, checkpoint: Checkpoint, device: torch.device, ignored: tuple[str, ...] = ()
) -> None:
    """Give a module on the meta device parameters on `device`, of the dtypes it has.

    Args:
        layout: for every parameter.
        ignored: prefixes of tensors that belong to others, or to nobody.
    Raises: CheckpointError naming the missing, unknown or misshapen tensors, before memory is taken.
    """
    wanted = dict(module.named_parameters())
    used = {key for pieces in layout.values() for piece in pieces for key in piece.keys}
    problems = [f"missing {key}" for key in sorted(used) if key not in checkpoint.shapes]
    problems += [f"unknown {key}" for key in checkpoint.shapes if key not in used and not key.startswith(ignored)]
    problems += shape_problems(wanted, layout, checkpoint.shapes)
    refuse(checkpoint, problems)
    state = {}
    for name, pieces in layout.items():
        state[name] = parameter = torch.empty_like(wanted[name], device=device)
        row = 0
        for piece in pieces:
            part = piece.change(*(checkpoint.read(key) for key in piece.keys))
            parameter[row : row + len(part)] = part
            row += len(part)
            del part  # the file is unmapped while nobody holds a tensor of it
    checkpoint.close()
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def shape_problems(wanted: Mapping[str, Tensor], layout: Layout, shapes: Mapping[str, torch.Size]) -> list[str]:
    """What does not fit, found by following the layout without data."""
    problems = []
    for name, pieces in layout.items():
        keys = [key for piece in pieces for key in piece.keys]
        if not all(key in shapes for key in keys):
            continue
        expected = list(wanted[name].shape)
        sources = ", ".join(f"{key} {list(shapes[key])}" for key in keys)
        try:
            parts = [
                list(piece.change(*(torch.empty(shapes[key], device="meta") for key in piece.keys)).shape)
                for piece in pieces
            ]
        except (RuntimeError, IndexError, TypeError, ZeroDivisionError) as error:  # a change that can't be made
            problems.append(f"{name}: expected {expected}, got {sources}: {str(error).partition(chr(10))[0]}")
            continue
        if sum(part[0] for part in parts if part) != expected[0] or any(part[1:] != expected[1:] for part in parts):
            problems.append(f"{name}: expected {expected}, got {' + '.join(map(str, parts))} from {sources}")
    return problems


def assign(module: nn.Module, tensors: Mapping[str, Tensor], origin: object) -> None:
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
    refuse(origin, problems)
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)


def refuse(origin: object, problems: Sequence[str]) -> None:
    """Raises: CheckpointError that lists the first of `problems`, if there is one."""
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{origin}: the weights do not fit config.json: {listed}")


# ------------------------------------------------------------------------------------------------- changes of a tensor


def rows(first: int, count: int) -> Callable[[Tensor], Tensor]:
    """Rows first..first + count - 1."""
    return lambda tensor: tensor[first : first + count]


def pair_halves(head_dim: int) -> Callable[[Tensor], Tensor]:
    """Heads whose rotary pairs are neighbours, in the order of the block, where they are half a head apart: the even
    rows of every head, then the odd ones. Queries and keys both change so, hence their products do not."""
    return lambda tensor: tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def pad_heads(block: BlockConfig) -> Callable[[Tensor], Tensor]:
    """Rows of heads of `unpadded_head_dim` -> of `head_dim`: zeros behind each half, since the halves are rotated as
    pairs. Heads of a power of 2 rows are left alone."""
    half, padded = block.unpadded_head_dim // 2, block.head_dim // 2

    def pad(tensor: Tensor) -> Tensor:
        if half == padded:
            return tensor
        halves = tensor.unflatten(0, (-1, half))
        out = halves.new_zeros(len(halves), padded, *halves.shape[2:])
        out[:, :half] = halves
        return out.flatten(0, 1)

    return pad


def pad_head_columns(block: BlockConfig) -> Callable[[Tensor], Tensor]:
    """The same for the columns of the output product."""
    pad = pad_heads(block)
    return lambda tensor: pad(tensor.T).T


def share_groups(num_heads: int) -> Callable[[Tensor], Tensor]:
    """[groups, D] -> [num_heads, D]: models trained on several devices have one QK-norm for the heads of each."""
    return lambda tensor: tensor.repeat_interleave(max(num_heads // len(tensor), 1), 0)


# ------------------------------------------------------------------------------------------ the Hugging Face layout


def block_config(
    config: Mapping[str, Any],
    origin: object,
    *,
    theta: float | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> BlockConfig:
    """The block of a Hugging Face config.

    Args:
        config: with the family's defaults filled in.
        theta: of RoPE where the config has none; None demands one.
    Raises: CheckpointError where a key is missing, no size, or asks for something that the block does not do.
    """
    rope, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    kinds = {settings.get("rope_type", settings.get("type", "default")) for settings in (rope, scaling)}
    if config.get("hidden_act", "silu") != "silu" or config.get("use_sliding_window") or kinds - {"default", "linear"}:
        raise CheckpointError(
            f"{origin}: expected hidden_act silu, plain or linearly scaled RoPE and no sliding window in config.json"
        )
    try:
        num_heads = config["num_attention_heads"]
        sizes = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_heads": num_heads,
            "num_kv_heads": config["num_key_value_heads"] or num_heads,
            "max_positions": config["max_position_embeddings"],
        }
        for name, value in {**sizes, "vocab_size": config["vocab_size"]}.items():
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise CheckpointError(f"{origin}: expected {name} in 1..{MAX_SIZE} in config.json, got {value!r}")
        head_dim = config.get("head_dim") or sizes["hidden_size"] // num_heads
        if head_dim % 2 or num_heads % sizes["num_kv_heads"]:
            raise CheckpointError(
                f"{origin}: expected an even head_dim and whole groups of heads in config.json, got {head_dim} and "
                f"{num_heads} / {sizes['num_kv_heads']}"
            )
        return BlockConfig(
            **sizes,
            unpadded_head_dim=head_dim,
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or theta or config["rope_theta"]),
            norm_eps=config["rms_norm_eps"],
            norm_style="swin" if config.get("swin_norm") else "pre",
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            rope_factor=float({**scaling, **rope}["factor"]) if "linear" in kinds else 1.0,
        )
    except KeyError as error:
        raise CheckpointError(f"{origin}: config.json lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: config.json: {error}") from None


def hf_layout(block: BlockConfig, prefix: str) -> Layout:
    """Final norm and blocks of a model with Hugging Face's names, which begin with `prefix`."""
    pad = pad_heads(block)
    layout: Layout = {"norm": [Piece.of(f"{prefix}.norm.weight")]}
    for i in range(block.num_layers):
        source, target = f"{prefix}.layers.{i}", f"blocks.{i}"
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        layout |= {
            f"{target}.norm1": [Piece.of(f"{source}.input_layernorm.weight")],
            f"{target}.norm2": [Piece.of(f"{source}.post_attention_layernorm.weight")],
            f"{target}.wqkv": [Piece.of(f"{attention}.{x}_proj.weight", pad) for x in "qkv"],
            f"{target}.wo": [Piece.of(f"{attention}.o_proj.weight", pad_head_columns(block))],
            f"{target}.w_gate_up": [Piece.of(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")],
            f"{target}.w_down": [Piece.of(f"{mlp}.down_proj.weight")],
        }
        if block.qkv_bias:
            layout[f"{target}.bqkv"] = [Piece.of(f"{attention}.{x}_proj.bias", pad) for x in "qkv"]
        if block.qk_norm:
            groups = (("q", share_groups(block.num_heads)), ("k", share_groups(block.num_kv_heads)))
            for name, part in (("qk_norm", "weight"), ("qk_norm_bias", "bias")):
                layout[f"{target}.{name}"] = [Piece.of(f"{attention}.{x}_norm.{part}", share) for x, share in groups]
    return layout


def load_transformer(
    checkpoint: Checkpoint,
    block: BlockConfig,
    layout: Callable[[BlockConfig], Layout],
    *,
    vocab_size: int,
    num_codes: int,
    device: torch.device,
    dtype: torch.dtype,
    ignored: tuple[str, ...] = (),
    rope: tuple[Tensor, Tensor] | None = None,
    head_hidden: int | None = None,
) -> Transformer:
    """A transformer from its checkpoint; see `Transformer` and `load` for the arguments.

    Args:
        layout: of `block`; called once its number of layers is known to be no lie.
        dtype: of everything but the head, which is float32.
    Raises: CheckpointError.
    """
    if block.num_layers > len(checkpoint.shapes):
        raise CheckpointError(
            f"{checkpoint}: config.json says {block.num_layers} layers, but there are {len(checkpoint.shapes)} tensors"
        )
    with torch.device("meta"):
        model = Transformer(block, vocab_size, num_codes, rope=rope, head_hidden=head_hidden).cast(dtype)
    load(model, layout(block), checkpoint, device, ignored)
    return model.to(device)


def load_qwen2(
    checkpoint: Checkpoint, *, first_code: int, num_codes: int, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """A Qwen2 checkpoint as the engine's transformer, its head cut to the image rows.

    Args:
        first_code: vocabulary row of image code 0.
        num_codes: V.
    Raises: CheckpointError.
    """
    config = checkpoint.config
    embedding = "model.embed_tokens.weight"
    head = embedding if config.get("tie_word_embeddings") else "lm_head.weight"
    return load_transformer(
        checkpoint,
        block_config(config, checkpoint, qkv_bias=True),
        lambda block: {
            "embedding": [Piece.of(embedding)],
            "head": [Piece.of(head, rows(first_code, num_codes))],
            **hf_layout(block, "model"),
        },
        vocab_size=config["vocab_size"],
        num_codes=num_codes,
        device=device,
        dtype=dtype,
        ignored=("lm_head.weight",) if head == embedding else (),
    )
