"""Fine-tuning of models of any family: their batches against teacher forcing, and the script from prompts to images."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    CODES,
    PROMPT,
    Tiny,
    emu3_checkpoint,
    janus_checkpoint,
    llamagen_text_checkpoint,
    lumina_checkpoint,
)

from sjd_engine import Engine
from sjd_engine.denoise import Denoiser, NoiseSchedule
from sjd_engine.models import emu3
from sjd_engine.schedule import with_forced
from sjd_engine.testing import teacher_forced_logits
from sjd_engine.train.pictures import collate
from sjd_engine.train.sjd2 import Losses, Noise
from sjd_engine.train.trainer import Trainer

FAMILIES: dict[str, Callable[[Path], Tiny]] = {
    "janus": lambda folder: janus_checkpoint(folder, official=False),
    "lumina": lambda folder: lumina_checkpoint(folder, swin=False),
    "emu3": lambda folder: emu3_checkpoint(folder, "hf-5"),
    "llamagen-text": llamagen_text_checkpoint,
}
SCRIPT = Path(__file__).parents[2] / "examples" / "sjd2" / "train.py"


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory) -> Tiny:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emu3, "SIDE", 16)
        yield FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def test_a_batch_is_read_as_decoding_reads_it(tiny):
    """Of two pictures, one behind no prompt: the clean copy, the noisy one without noise, and forced tokens."""
    model = tiny.load()
    schedule = model.schedule(*tiny.size)
    prompt = model.build_prompt(PROMPT, None, *tiny.size)
    contexts = [prompt.unconditional, prompt.conditional]
    codes = torch.randint(CODES, (2, schedule.rows * schedule.cols), generator=torch.Generator().manual_seed(0))
    pictures = collate(model, contexts, codes, schedule)
    embeddings = model.transformer.embedding[model.first_code :][: model.num_codes]
    denoiser = Denoiser.new(embeddings, NoiseSchedule())
    noise = Noise.sample(2, schedule.num_tokens - 1, embeddings.shape[1], torch.Generator().manual_seed(0))
    none = torch.ones(2, schedule.num_tokens - 1, dtype=torch.bool)
    clean, noisy = Losses(model.transformer, denoiser, model.first_code)(noise.without(none), pictures)
    image = schedule.image_positions
    for row, context in enumerate(contexts):
        law = teacher_forced_logits(model, context, with_forced(codes[row : row + 1], schedule)).log_softmax(-1)
        nats = -law[0, image].gather(1, codes[row, :, None])[:, 0]
        torch.testing.assert_close(clean[row, image], nats, rtol=0, atol=1e-4)
        torch.testing.assert_close(noisy[row, image[1:] - 1], nats[1:], rtol=0, atol=1e-4)
    times = Trainer(model.transformer, denoiser, model.first_code, num_steps=1, lr=0.0).nats(pictures, 0).times
    behind_forced = torch.tensor([t - 1 in schedule.forced for t in image[1:].tolist()])
    assert torch.equal(times.view(2, -1) == 0, behind_forced.expand(2, -1))


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train_any", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def arguments(tiny: Tiny, folder: Path, *more: str) -> list[str]:
    (folder / "prompts.txt").write_text(f"{PROMPT}\n\n{PROMPT} {PROMPT}\n")
    fixed = ["--model", tiny.path, "--out", folder / "run", "--pictures-per-prompt", 3, "--batch-size", 2]
    fixed += ["--held-out", 1, "--height", tiny.size[0], "--width", tiny.size[1], "--warmup", 1, "--log-every", 1]
    return [str(part) for part in (folder / "prompts.txt", *fixed, *more)]


def test_the_script_makes_a_model_that_decodes(tiny, main, tmp_path):
    main(arguments(tiny, tmp_path, "--steps", 1))
    drawn = tmp_path / "run" / "pictures" / "0000000.npy"
    first = drawn.stat().st_mtime_ns
    main(arguments(tiny, tmp_path, "--steps", 2))
    assert drawn.stat().st_mtime_ns == first, "pictures are drawn once"
    lines = [json.loads(line) for line in (tmp_path / "run" / "sjd2.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    main(arguments(tiny, tmp_path, "--steps", 2, "--export", tmp_path / "tuned"))
    main(arguments(tiny, tmp_path, "--plot", tmp_path / "log.svg"))
    assert (tmp_path / "log.svg").stat().st_size > 0
    height, width = tiny.size
    options = {"height": height, "width": width, "window_size": 4, "output_type": "codes", "progress": False}
    images = Engine(tmp_path / "tuned", device="cpu").generate(PROMPT, method="sjd2", steps=2, **options)
    assert images.token_ids.shape == (1, tiny.shape[0] * tiny.shape[1])


def test_the_script_takes_codes_of_the_user_and_says_what_does_not_fit(main, tmp_path):
    tiny = lumina_checkpoint(tmp_path, swin=False)
    codes = np.random.default_rng(0).integers(0, CODES, (6, 8), np.int16)

    def run(stored: np.ndarray, *more: str) -> None:
        np.save(tmp_path / "codes.npy", stored)
        main(arguments(tiny, tmp_path, "--steps", 1, "--codes", tmp_path / "codes.npy", *more))

    run(codes)
    assert not (tmp_path / "run" / "pictures").exists()
    for stored, more, message in (
        (codes[:5], (), r"--codes: expected \[6, 8\], a row for each prompt, got \[5, 8\]"),
        (codes + CODES, (), "--codes: expected integers from 0 to 31"),
        (codes / 2, (), "--codes: expected integers from 0 to 31, got float64"),
        (codes, ("--held-out", 3), "prompts: expected pictures for --held-out >= 1 batches and one more, got 6"),
        (codes, ("--out", tmp_path / "new", "--export", tmp_path / "tuned"), "--export: expected a checkpoint, got no"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(stored, *more)


def test_pictures_of_other_prompts_are_not_mixed(main, tmp_path):
    tiny = lumina_checkpoint(tmp_path, swin=False)
    main(arguments(tiny, tmp_path, "--steps", 1))
    with pytest.raises(SystemExit, match=r"--out: expected a new folder for other pictures; .*request.json says which"):
        main(arguments(tiny, tmp_path, "--steps", 1, "--seed", 1))
