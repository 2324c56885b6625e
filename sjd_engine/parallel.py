"""Tensor parallelism: every process holds a share of the heads, of the feed-forward and of the image codes.

    wqkv, bqkv, qk_norm   the rows of its kv heads and of the query heads that read them
    w_gate_up             the same rows of gate and of up
    wo, w_down            the columns that meet those rows; the products are summed over the processes
    head                  the rows of its codes; the logits are put together, so that all processes verify the same
    norms, embedding      whole

Plain tensors and two sums a layer, not DTensor: a joined product is cut in each of its parts, which DTensor's shards of
equal rows are not, and the ops of the paged cache work on memory, which a DTensor does not show.

Source: Shoeybi et al., "Megatron-LM" (arXiv 1909.08053), section 3.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sjd_engine.models.block import Block, BlockConfig, Pass, Transformer


class SharedBlock(Block):
    """The share of one layer."""

    def _attention(self, x: Tensor, run: Pass) -> Tensor:
        return add_up(super()._attention(x, run))

    def _mlp(self, x: Tensor, run: Pass) -> Tensor:
        return add_up(super()._mlp(x, run))


class SharedTransformer(Transformer):
    """The share of a transformer; `config` and the key/value cache are those of its heads."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> [..., V] float32 logits of the codes of all processes."""
        mine = super().logits(hidden).contiguous()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        return torch.cat(parts, -1)

    def slowest(self, seconds: float) -> float:
        value = torch.tensor(seconds, dtype=torch.float64, device=self.embedding.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()  # sync: all processes must decide alike


def add_up(x: Tensor) -> Tensor:
    """The sum of every process's `x`, in its place; bit for bit the same in all of them."""
    dist.all_reduce(x)
    return x


def share(transformer: Transformer) -> SharedTransformer:
    """This process's share of `transformer`, which is used up layer by layer. All processes of the default group call
    this, and later make the same calls of it.

    Raises: RuntimeError without a process group; ValueError where heads, feed-forward or codes cannot be cut equally.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "tensor_parallel: there is no process group; start the program with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    config, size = transformer.config, dist.get_world_size()
    counts = {
        "kv heads": config.num_kv_heads,
        "feed-forward columns": config.intermediate_size,
        "image codes": len(transformer.head),
    }
    for name, count in counts.items():
        if count % size:
            raise ValueError(f"tensor_parallel: expected a number of processes that divides {count} {name}, got {size}")
    part = SharedTransformer.__new__(SharedTransformer)
    part.__dict__.update(transformer.__dict__)
    part.config = replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )
    for layer, block in enumerate(transformer.blocks):
        with torch.device("meta"):
            mine = SharedBlock(part.config, layer)
        mine.load_state_dict({name: cut(name, t, config) for name, t in block.state_dict().items()}, assign=True)
        part.blocks[layer] = mine.requires_grad_(False)
    for name, parameter in transformer.named_parameters(recurse=False):
        setattr(part, name, nn.Parameter(cut(name, parameter, config), requires_grad=False))
    return part


def cut(name: str, tensor: Tensor, config: BlockConfig) -> Tensor:
    """This process's share of a parameter of the transformer or of a block.

    Args:
        config: of the whole.
    """
    heads = (config.num_heads, config.num_kv_heads)
    joined = (config.q_size, config.kv_size, config.kv_size)
    ffn = config.intermediate_size
    parts, dim = {
        "wqkv": (joined, 0),
        "bqkv": (joined, 0),
        "qk_norm": (heads, -2),
        "qk_norm_bias": (heads, -2),
        "wo": ((config.q_size,), 1),
        "w_gate_up": ((ffn, ffn), 0),
        "w_down": ((ffn,), 1),
        "head": ((len(tensor),), 0),
        "head_bias": ((len(tensor),), 0),
    }.get(name, ((), 0))
    if not parts:
        return tensor.detach()
    rank, size = dist.get_rank(), dist.get_world_size()
    return torch.cat([part.chunk(size, dim)[rank] for part in tensor.detach().split(parts, dim)], dim)
