"""A model that was fine-tuned for SJD2: what is stored, what is loaded, and what is wrong with other files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sjd_engine import CheckpointError, Engine
from sjd_engine.denoise import Denoiser, NoiseSchedule
from sjd_engine.models import load_model
from sjd_engine.models.base import ImageModel
from sjd_engine.models.fine_tuned import CONFIG, WEIGHTS, save_fine_tuned

CPU = torch.device("cpu")
PROMPTS = ["a red apple", "a cat face on grass"]


@pytest.fixture(scope="module")
def untrained() -> ImageModel:
    """The bundled model, with a denoiser that knows nothing yet."""
    model = load_model("emoji", CPU, torch.float32)
    rows = model.transformer.embedding[model.first_code :][: model.num_codes]
    model.denoiser = Denoiser.new(rows, NoiseSchedule(steps=3))
    return model


@pytest.fixture
def folder(untrained, tmp_path) -> Path:
    save_fine_tuned(untrained, tmp_path / "tuned", "emoji")
    return tmp_path / "tuned"


def test_what_was_saved_is_loaded_and_nothing_else_changes(untrained, folder):
    loaded = load_model(folder, CPU, torch.float32)
    assert (loaded.name, loaded.draft_head, loaded.denoiser.schedule) == ("tuned", None, NoiseSchedule(steps=3))
    for mine, theirs in ((untrained.transformer, loaded.transformer), (untrained.denoiser, loaded.denoiser)):
        for (name, tensor), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(tensor, other), name
    stored = load_file(folder / WEIGHTS)
    assert not any("embedding" in name or "head" in name for name in stored)


def test_without_noise_it_is_the_base_model_bit_for_bit(folder, engine):
    """Before the fine-tuning, with every slot a token: an image of a method that reads no noise."""
    tuned = Engine(folder, device="cpu", dtype=torch.float32)
    mine, base = (e.generate(PROMPTS[0], window_size=32, output_type="codes").token_ids for e in (tuned, engine))
    assert torch.equal(mine, base)


def test_sjd2_draws_an_image_alone_as_in_a_batch(untrained):
    engine = Engine(untrained)
    arguments = {"method": "sjd2", "window_size": 32, "steps": 2, "output_type": "codes", "progress": False}
    for verify in ("clean", "paper"):
        both = engine.generate(PROMPTS, seed=[3, 4], verify=verify, **arguments)
        alone = engine.generate(PROMPTS[1], seed=4, verify=verify, **arguments)
        assert torch.equal(both.token_ids[1], alone.token_ids[0])
        assert alone.stats[0].nfe < 256
        assert alone.stats[0].zero_draft_prob == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "sjd2", "steps": 0}, "steps: expected >= 1, got 0"),
        ({"method": "sjd2", "verify": "all"}, "verify: expected one of clean, paper, got 'all'"),
        ({"method": "sjd", "steps": 5}, "steps: sjd has none, only sjd2; leave it out"),
        ({"method": "maximal", "verify": "clean"}, "verify: maximal has none, only sjd2; leave it out"),
        ({"method": "sjd2", "tree": (2, 2)}, "tree: sjd2 takes none"),
    ],
)
def test_bad_arguments_name_themselves(untrained, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(untrained).generate(PROMPTS[0], **arguments)


def test_a_model_that_reads_no_noise_says_so(engine):
    with pytest.raises(ValueError, match=r"method: sjd2 reads noise, which emoji was not fine-tuned for: load"):
        engine.generate(PROMPTS[0], method="sjd2")


def break_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def break_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | {name: tensor}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: break_config(f, base=None), 'expected "base", the name of a model, got None'),
        (lambda f: break_config(f, base="tuned"), "expected a base model that is no fine-tuned one itself"),
        (lambda f: break_config(f, schedule={"steps": 0}), "expected the settings of a noise schedule: steps"),
        (lambda f: break_tensor(f, "transformer.norm", torch.ones(3)), r"norm: expected \[256\], got \[3\]"),
        (lambda f: break_tensor(f, "transformer.extra", torch.ones(3)), "unknown extra"),
        (lambda f: break_tensor(f, "extra", torch.ones(3)), "unknown extra"),
        (lambda f: break_tensor(f, "denoiser.mean", torch.ones(3)), r"mean: expected \[256\], got \[3\]"),
        (lambda f: (f / WEIGHTS).unlink(), "no sjd2.safetensors"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, CPU, torch.float32)


def test_the_bundled_one_needs_fewer_passes_than_drafts_redrawn():
    engine = Engine("emoji-sjd2", device="cpu", dtype=torch.bfloat16)
    passes = {}
    for method in ("sjd", "sjd2"):
        out = engine.generate(PROMPTS, num_images_per_prompt=2, method=method, window_size=32, output_type="codes")
        passes[method] = sum(stats.nfe for stats in out.stats)
    assert passes["sjd2"] <= 0.75 * passes["sjd"], passes
