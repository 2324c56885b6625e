"""Two processes that share a model, against one that has it whole. The file is its own worker: torchrun runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sjd_engine import Engine, parallel
from sjd_engine.models.block import BlockConfig, Transformer

PROMPT = "a red apple on grass"
REQUESTS = ({"method": "exact"}, {"method": "jacobi", "guidance_scale": 1.0})
SWITCHES = {
    "grouped": {"num_kv_heads": 2, "qkv_bias": True},
    "swin": {"num_kv_heads": 4, "qk_norm": True, "norm_style": "swin"},
}


def tiny(switches: dict) -> Transformer:
    """A transformer with a random value in every parameter."""
    config = BlockConfig(
        num_layers=2,
        hidden_size=48,
        intermediate_size=64,
        num_heads=4,
        unpadded_head_dim=16,
        max_positions=32,
        rope_theta=1e4,
        norm_eps=1e-5,
        **switches,
    )
    model = Transformer(config, 40, 40)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def logits(model: Transformer) -> Tensor:
    ids = torch.arange(20).view(2, 10)
    return model.logits(model(model.embed(ids), model.new_cache(2, 10)))


def matrix_bytes(model: Transformer) -> int:
    return sum(p.nbytes for block in model.blocks for p in block.parameters() if p.ndim > 1)


def images(**arguments: object) -> list[Tensor]:
    engine = Engine("emoji", device="cpu", dtype=torch.float32, **arguments)
    return [
        engine.generate(PROMPT, window_size=32, seed=3, output_type="codes", progress=False, **request).token_ids
        for request in REQUESTS
    ]


def work(folder: Path) -> None:
    """What a process of the group does: writes what it sees."""
    dist.init_process_group("gloo")
    seen: dict[str, object] = {"images": images(tensor_parallel=True)}
    for name, switches in SWITCHES.items():
        share = parallel.share(tiny(switches))
        seen[name] = logits(share)
        seen[f"{name} bytes"] = matrix_bytes(share)
    seen["slowest"] = share.slowest(1.5 + dist.get_rank())
    whole_sum, parallel.add_up = parallel.add_up, lambda x: x
    seen["never summed"] = logits(share)
    parallel.add_up = whole_sum
    uneven = tiny(SWITCHES["grouped"] | {"num_kv_heads": 1})
    try:
        parallel.share(uneven)
    except ValueError as error:
        seen["refused"] = str(error)
    torch.save(seen, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """Of each of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, __file__, str(folder)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_the_same_tokens_as_one_process(seen):
    """In float32. The sums of two halves round otherwise, by 1e-6 or so: a nearer tie could still fall otherwise."""
    for mine, theirs in zip(images(), seen[0]["images"], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", SWITCHES)
def test_the_same_logits_as_one_process(seen, name):
    assert (logits(tiny(SWITCHES[name])) - seen[0][name]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["images", *SWITCHES])
def test_processes_see_the_same_bit_for_bit(seen, name):
    for first, second in zip(seen[0][name], seen[1][name], strict=True):
        assert torch.equal(first, second)


def test_processes_agree_on_what_a_pass_takes(seen):
    assert [process["slowest"] for process in seen] == [2.5, 2.5]


def test_shares_that_are_never_summed_would_show(seen):
    assert (logits(tiny(SWITCHES["swin"])) - seen[0]["never summed"]).abs().max() > 0.1


@pytest.mark.parametrize("name", SWITCHES)
def test_each_process_holds_half_of_every_matrix(seen, name):
    assert 2 * seen[0][f"{name} bytes"] == matrix_bytes(tiny(SWITCHES[name]))


def test_heads_that_cannot_be_shared_are_refused(seen):
    assert seen[0]["refused"] == ("tensor_parallel: expected a number of processes that divides 1 kv heads, got 2")


def test_without_a_process_group_the_engine_says_how_to_make_one():
    with pytest.raises(RuntimeError, match="start the program with torchrun"):
        Engine("emoji", device="cpu", tensor_parallel=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
