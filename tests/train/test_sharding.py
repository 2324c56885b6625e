"""Two processes that train together, against one. The file is its own worker: torchrun runs it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sjd_engine.denoise import Denoiser, NoiseSchedule
from sjd_engine.models.block import BlockConfig
from sjd_engine.testing import random_transformer
from sjd_engine.train import trainer as trainer_module
from sjd_engine.train.checkpoints import load_checkpoint, save_checkpoint
from sjd_engine.train.pictures import Pictures
from sjd_engine.train.trainer import Trainer

VOCAB, CODES, TOKENS, PROMPT = 20, 12, 20, 3
FIRST, SECOND, ALL = range(2), range(2, 4), range(4)  # steps
TOLERANCE = 2e-3  # Muon rounds to bfloat16; the steps move weights by up to 0.035


def new_trainer(**settings: bool) -> Trainer:
    """Of a transformer with a random value in every parameter, whose rows two processes do not divide evenly."""
    config = BlockConfig(
        num_layers=2,
        hidden_size=18,
        intermediate_size=25,
        num_heads=2,
        num_kv_heads=1,
        unpadded_head_dim=8,
        max_positions=PROMPT + TOKENS,
        rope_theta=100.0,
        norm_eps=1e-6,
        qk_norm=True,
        qkv_bias=True,
    )
    transformer = random_transformer(config, VOCAB, CODES)
    denoiser = Denoiser.new(transformer.embedding[-CODES:], NoiseSchedule())
    return Trainer(transformer, denoiser, VOCAB - CODES, num_steps=ALL.stop, lr=1e-2, warmup=1, **settings)


def batch(step: int, count: int = 4) -> Pictures:
    generator = torch.Generator().manual_seed(step)
    codes = torch.randint(CODES, (count, TOKENS), generator=generator)
    prompts = torch.randint(VOCAB - CODES, (count, PROMPT), generator=generator)
    ids = torch.cat((prompts, codes[:, :-1] + VOCAB - CODES), 1)
    return Pictures(ids, torch.full((count,), PROMPT - 1), codes)


def train(start: Path | None, end: Path, steps: range) -> Tensor:
    """From one checkpoint to another; the mean nats of every step, and of an evaluation at the end."""
    trainer = new_trainer(gradient_checkpointing=True)
    assert start is None or load_checkpoint(start, trainer) == steps.start
    nats = [trainer.step(step, batch(step)) for step in steps]
    nats.append(trainer.evaluate([batch(9), batch(10)]))
    save_checkpoint(end, steps.stop, trainer)
    return torch.stack([torch.cat((part.clean, part.noisy)).mean() for part in nats])


def work(folder: Path) -> None:
    """What a process of the group does: writes what it sees."""
    dist.init_process_group("gloo")
    seen: dict[str, Any] = {"nats": train(None, folder / "two.pt", ALL)}
    train(None, folder / "two-half.pt", FIRST)
    dist.barrier()  # until the first process has written it
    train(folder / "two-half.pt", folder / "two-resumed.pt", SECOND)
    train(folder / "one.pt", folder / "one-again.pt", range(4, 4))
    seen["bytes"] = sum(part.to_local().nbytes for part in new_trainer().copies)
    with pytest.raises(ValueError, match="pictures: expected a number that 2 processes divide, got 3"):
        new_trainer().step(0, batch(0, count=3))
    with pytest.raises(ValueError, match="compile: expected one process, got 2; leave it out"):
        new_trainer(compile=True)
    trainer_module.own_rows = lambda rows: rows[:2]  # the broken variant: all processes read the same
    train(None, folder / "broken.pt", FIRST)
    torch.save(seen, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the checkpoints of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save(train(None, folder / "one.pt", ALL), folder / "one-nats.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, __file__, str(folder)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def tensors(state: Any) -> list[Tensor]:
    """All that a checkpoint holds."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return [tensor for part in state for tensor in tensors(part)]
    return [state] if isinstance(state, Tensor) else []


def difference(*paths: Path) -> float:
    """The largest between two checkpoints, optimisers and all."""
    parts = [tensors(torch.load(path, weights_only=True)) for path in paths]
    return max((one - two).abs().max().item() for one, two in zip(*parts, strict=True))


def test_two_processes_do_the_steps_of_one(folder):
    seen = [torch.load(folder / f"{rank}.pt")["nats"] for rank in range(2)]
    assert torch.equal(*seen)
    torch.testing.assert_close(seen[0], torch.load(folder / "one-nats.pt"), rtol=0, atol=1e-3)
    assert difference(folder / "one.pt", folder / "two.pt") < TOLERANCE


def test_processes_that_read_the_same_pictures_would_show(folder):
    assert difference(folder / "broken.pt", folder / "two-half.pt") > 3 * TOLERANCE


def test_interrupted_processes_end_with_the_same_weights(folder):
    assert difference(folder / "two.pt", folder / "two-resumed.pt") == 0


def test_a_checkpoint_is_read_by_any_number_of_processes(folder, tmp_path):
    assert difference(folder / "one.pt", folder / "one-again.pt") == 0
    train(folder / "two.pt", tmp_path / "two-again.pt", range(4, 4))
    assert difference(folder / "two.pt", tmp_path / "two-again.pt") == 0


def test_each_process_holds_half_of_the_weights(folder):
    total = sum(copy.nbytes for copy in new_trainer().copies)
    shares = [torch.load(folder / f"{rank}.pt")["bytes"] for rank in range(2)]
    assert sum(shares) == total
    assert max(shares) < 0.51 * total


if __name__ == "__main__":
    work(Path(sys.argv[1]))
