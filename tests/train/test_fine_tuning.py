"""Fine-tuning for SJD2: its noise, which slots read which, and runs that are interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sjd_engine.denoise import Denoiser, NoiseSchedule
from sjd_engine.models.block import Block, BlockConfig, Pass, Transformer
from sjd_engine.testing import random_transformer
from sjd_engine.train import whole_sequence
from sjd_engine.train.checkpoints import load_checkpoint, save_checkpoint
from sjd_engine.train.pictures import Pictures
from sjd_engine.train.sjd2 import Losses, Noise, visible_slots
from sjd_engine.train.trainer import Trainer
from sjd_engine.train.whole_sequence import WholeSequence

VOCAB, CODES, TOKENS, PROMPT = 20, 12, 24, 5


def tiny() -> tuple[Transformer, Denoiser]:
    config = BlockConfig(
        num_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        unpadded_head_dim=8,
        max_positions=PROMPT + TOKENS,
        rope_theta=100.0,
        norm_eps=1e-6,
    )
    transformer = random_transformer(config, VOCAB, CODES)
    return transformer, Denoiser.new(transformer.embedding[-CODES:], NoiseSchedule())


def batch(step: int) -> Pictures:
    """Two pictures, whose prompts have 3 and 5 tokens."""
    generator = torch.Generator().manual_seed(step)
    codes = torch.randint(CODES, (2, TOKENS), generator=generator)
    ids = torch.randint(VOCAB - CODES, (2, PROMPT + TOKENS - 1), generator=generator)
    first = torch.tensor([2, 4])
    for row in range(2):
        ids[row, first[row] + 1 : first[row] + TOKENS] = codes[row, :-1] + VOCAB - CODES
    return Pictures(ids, first, codes)


def noise_of(seed: int) -> Noise:
    """For `batch`."""
    return Noise.sample(2, TOKENS - 1, 16, torch.Generator().manual_seed(seed))


def test_noise_never_falls_along_a_segment():
    noise = Noise.sample(50, 255, 4, torch.Generator().manual_seed(0))
    inside = noise.starts[:, 1:] == noise.starts[:, :-1]
    assert (noise.times.diff(dim=1)[inside] >= 0).all()
    assert (noise.starts == torch.arange(255)).float().mean() < 1 / 20  # slots that begin a segment
    assert noise.times.min() > 0
    assert 0.3 < (noise.times == 1).float().mean() < 0.6


def test_a_slot_reads_the_prompt_clean_tokens_before_its_segment_and_noise_before_itself():
    starts, first = torch.tensor([[0, 0, 2, 2]]), torch.tensor([1])
    rows = visible_slots(starts, first, 7)[0, 7:].int().tolist()
    prompt = [1, 1]
    assert rows[0] == [*prompt, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert rows[1] == [*prompt, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert rows[3] == [*prompt, 1, 1, 0, 0, 0, 0, 0, 1, 1]


def test_before_training_clean_tokens_are_read_as_the_base_model_does():
    """And tokens without noise in the noisy copy give the same laws."""
    (transformer, denoiser), pictures = tiny(), batch(0)
    losses = Losses(transformer, denoiser, VOCAB - CODES)
    noise = noise_of(0)
    clean, noisy = losses(noise, pictures)
    for row, prompt in enumerate((3, 5)):
        whole = pictures.ids[row : row + 1, : prompt + TOKENS - 1]
        hidden = transformer(transformer.embed(whole), transformer.new_cache(1, whole.shape[1]))
        law = transformer.logits(hidden[:, prompt - 1 :]).log_softmax(-1)
        nats = -law.gather(-1, pictures.codes[row, None, :, None]).flatten()
        torch.testing.assert_close(clean[row], nats, rtol=0, atol=1e-5)
    again, quiet = losses(noise.without(torch.ones(2, TOKENS - 1, dtype=torch.bool)), pictures)
    torch.testing.assert_close(quiet, clean[:, 1:], rtol=0, atol=1e-5)
    assert torch.equal(again, clean)
    assert (noisy - quiet).abs().max() > 0.1


def test_without_normalisation_noise_is_added_to_the_embedding_itself():
    rows = tiny()[0].embedding[-CODES:].detach()
    normal, plain = (Denoiser.new(rows, NoiseSchedule(), normalise=normalise) for normalise in (True, False))
    assert torch.equal(plain.normalise(rows), rows)
    assert torch.equal(plain(rows, torch.ones(CODES, 16), torch.zeros(CODES)), rows)
    assert normal.normalise(rows).square().mean().sub(1).abs() < 1e-5


def test_attention_is_the_same_where_it_is_not_written_out(monkeypatch):
    """With queries in groups; the values and the gradients."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 9, heads, 8, generator=generator) for heads in (4, 2, 2))
    visible = visible_slots(torch.tensor([[0, 0, 2, 2], [0, 1, 1, 3]]), torch.tensor([1, 0]), 5)

    def attend() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (queries, keys, values)]
        attention = WholeSequence(visible)
        attention.append(0, *leaves[1:])
        out = attention.attend(0, leaves[0], 9, None)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    written_out = attend()
    monkeypatch.setattr(whole_sequence, "FEW_SCORES", 0)
    for expected, got in zip(written_out, attend(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def run(steps: range, path: Path, *, resume: bool, **settings: Any) -> dict[str, Tensor]:
    transformer, denoiser = tiny()
    trainer = Trainer(transformer, denoiser, VOCAB - CODES, num_steps=6, lr=1e-2, warmup=2, **settings)
    if resume:
        trainer.load_state_dict(torch.load(path, weights_only=True))
    for step in steps:
        trainer.step(step, batch(step))
    torch.save(trainer.state_dict(), path)
    return {**transformer.state_dict(), **denoiser.state_dict()}


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    whole = run(range(6), tmp_path / "whole.pt", resume=False)
    run(range(3), tmp_path / "part.pt", resume=False)
    resumed = run(range(3, 6), tmp_path / "part.pt", resume=True)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    before, denoiser = tiny()
    assert torch.equal(whole["embedding"], before.embedding)
    assert torch.equal(whole["head"], before.head)
    assert torch.equal(whole["mean"], denoiser.mean)
    for name in ("blocks.1.wqkv", "norm", "w_in", "w_out"):
        assert not torch.equal(whole[name], {**before.state_dict(), **denoiser.state_dict()}[name]), name


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path, part = tmp_path / "model.pt", torch.nn.Linear(2, 2)
    assert load_checkpoint(path, part) == 0
    save_checkpoint(path, 5, part)
    saved = part.weight.clone()
    part.weight.data.zero_()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, 6, part)
    assert load_checkpoint(path, part) == 5
    assert torch.equal(part.weight, saved)


def test_gradient_checkpointing_computes_blocks_again_and_gives_the_same_weights(tmp_path, monkeypatch):
    computed, forward = [], Block.forward

    def counted(block: Block, x: Tensor, run: Pass) -> Tensor:
        computed.append(block.layer)
        return forward(block, x, run)

    monkeypatch.setattr(Block, "forward", counted)
    kept = run(range(2), tmp_path / "part.pt", resume=False)
    assert computed == 2 * [0, 1]
    again = run(range(2), tmp_path / "part.pt", resume=False, gradient_checkpointing=True)
    assert computed[4:] == 2 * [0, 1, 1, 0]
    for name, tensor in kept.items():
        assert torch.equal(tensor, again[name]), name


def test_a_checkpoint_keeps_what_the_noise_is_relative_to_and_knows_its_parameters():
    pytest.importorskip("peft")
    (transformer, denoiser), settings = tiny(), {"num_steps": 1, "lr": 1e-2}
    plain = Denoiser.new(transformer.embedding[-CODES:], NoiseSchedule(), normalise=False)
    state = Trainer(transformer, plain, VOCAB - CODES, **settings).state_dict()
    Trainer(transformer, denoiser, VOCAB - CODES, **settings).load_state_dict(state)
    assert torch.equal(denoiser.std, torch.ones(16))
    with pytest.raises(ValueError, match="checkpoint: expected 20 parameters, got 17: of another model or lora"):
        Trainer(*tiny(), VOCAB - CODES, lora=2, **settings).load_state_dict(state)


def test_adapters_change_nothing_until_they_are_trained_and_merge_into_what_they_do():
    pytest.importorskip("peft")
    (transformer, denoiser), (before, _) = tiny(), tiny()
    losses, noise = Losses(transformer, denoiser, VOCAB - CODES), noise_of(0)
    base = losses(noise, batch(0))[0]
    trainer = Trainer(transformer, denoiser, VOCAB - CODES, num_steps=3, lr=1e-2, warmup=1, lora=2)
    assert torch.equal(losses(noise, batch(0))[0], base)
    for step in range(3):
        trainer.step(step, batch(step))
    adapted = losses(noise, batch(0))[0]
    assert (adapted - base).abs().max() > 1e-3
    trainer.merge_adapters()
    assert torch.equal(losses(noise, batch(0))[0], adapted)
    changed = {name for name, p in transformer.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {f"blocks.{layer}.{name}" for layer in range(2) for name in ("wqkv", "wo", "w_gate_up", "w_down")}


def test_an_interrupted_run_of_adapters_ends_with_the_same_weights(tmp_path):
    pytest.importorskip("peft")
    whole = run(range(4), tmp_path / "whole.pt", resume=False, lora=2)
    run(range(2), tmp_path / "part.pt", resume=False, lora=2)
    resumed = run(range(2, 4), tmp_path / "part.pt", resume=True, lora=2)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected >= 1, got 0"),
        ({"warmup": 0}, "warmup: expected >= 1, got 0"),
        ({"decay": 0.0}, r"decay: expected a share of the steps in \(0, 1\], got 0.0"),
        ({"lora": 0}, "lora: expected a rank >= 1, got 0"),
    ],
)
def test_a_trainer_names_what_is_wrong(settings, message):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        Trainer(*tiny(), VOCAB - CODES, **{"num_steps": 1, "lr": 1e-2} | settings)


def test_training_lowers_the_loss_behind_noise():
    transformer, denoiser = tiny()
    trainer = Trainer(transformer, denoiser, VOCAB - CODES, num_steps=30, lr=2e-2, warmup=2)
    nats = [trainer.step(step, batch(0)).noisy.mean().item() for step in range(30)]
    assert sum(nats[-5:]) < 0.9 * sum(nats[:5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "linear"}, "kind: expected one of flow, cosine, got 'linear'"),
        ({"steps": 0}, "steps: expected >= 1, got 0"),
        ({"rho": 0.0}, "rho: expected > 0, got 0.0"),
        ({"least": 0.0}, r"least: expected a time in \(0, 1\], got 0.0"),
    ],
)
def test_a_schedule_names_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**settings)
