"""One training by several processes, which torchrun starts: each holds a share of every parameter (FSDP) and reads a
share of every batch. Without a process group all of this does nothing."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def join() -> torch.device:
    """Join the group where torchrun has started this process. Returns: the device to train on."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    return device


def leave() -> None:
    """Leave the group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard(parts: list[nn.Module], device: torch.device) -> None:
    """Share the parameters among the processes, in place. parts: those that are gathered at once, the root last."""
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (num_processes(),))
        for part in parts:
            fully_shard(part, mesh=mesh)


def own_rows(rows: Tensor) -> Tensor:
    """This process's share of the rows of a batch."""
    return rows.chunk(num_processes())[rank()]


def all_rows(rows: Tensor) -> Tensor:
    """The shares of all processes, which are of one size."""
    if not dist.is_initialized():
        return rows
    shares = [torch.empty_like(rows) for _ in range(num_processes())]
    dist.all_gather(shares, rows)
    return torch.cat(shares)


def whole(state: Any) -> Any:
    """A state dict with whole tensors, on the CPU and in the first process alone; the others only lend a hand."""
    if isinstance(state, dict):
        return {name: whole(part) for name, part in state.items()}
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if rank() == 0 else None
    return state


def like(saved: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of a checkpoint, shared among the processes as `parameter` is."""
    if not isinstance(parameter, DTensor) or saved.shape != parameter.shape:
        return saved
    moved = saved.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
