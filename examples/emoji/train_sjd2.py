"""Fine-tune an exported model for SJD2: it learns to read noisy embeddings in the place of drafts.

    python examples/emoji/train_sjd2.py --cache .cache/emoji --model sjd_engine/assets/emoji

With --export it writes what it has trained so far instead, as a folder that the Engine loads:

    python examples/emoji/train_sjd2.py --export out/emoji-sjd2

The log has a line of JSON for every few steps, with the nats behind clean tokens and behind noisy ones of five bands of
noise. Resumes from its checkpoint.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from checkpoints import load_checkpoint, save_checkpoint
from data import CANVAS, training_folder
from torch import Tensor
from tqdm import trange
from train_transformer import CaptionedCodes

from sjd_engine.denoise import Denoiser, NoiseSchedule
from sjd_engine.models import load_model
from sjd_engine.models.fine_tuned import save_fine_tuned
from sjd_engine.train.sjd2 import Noise, Trainer, losses

NULL_CAPTION_RATE = 0.25  # guidance reads the law without a caption as often as the one with
BANDS = (0.0, 0.3, 0.6, 0.8, 0.999, 1.0)  # times, for the log


def bands(nats: Tensor, times: Tensor) -> list[float | None]:
    """Mean nats of the slots in each band of noise."""
    parts = [nats[(times > low) & (times <= high)] for low, high in pairwise(BANDS)]
    return [round(part.mean().item(), 4) if len(part) else None for part in parts]


@torch.no_grad()
def evaluate(trainer: Trainer, data: CaptionedCodes, count: int, batch_size: int) -> dict:
    """Nats on `count` pictures, with captions and noise drawn from a fixed seed."""
    rng, clean, noisy, times = np.random.default_rng(1234), [], [], []
    for start in range(0, count, batch_size):
        ids, first, codes = data.batch(np.arange(start, start + batch_size), rng, null_rate=0.0)
        generator = torch.Generator().manual_seed(start)
        noise = Noise.sample(batch_size, codes.shape[1] - 1, trainer.transformer.config.hidden_size, generator)
        result = losses(trainer.transformer, trainer.denoiser, noise, ids, first, codes, trainer.first_code)
        for parts, part in zip((clean, noisy, times), (*result, noise.times), strict=True):
            parts.append(part)
    behind_noise = bands(torch.cat(noisy), torch.cat(times))
    return {"held_out_clean": round(torch.cat(clean).mean().item(), 4), "held_out_noisy": behind_noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--model", type=Path, default=Path("sjd_engine/assets/emoji"), help="exported folder")
    parser.add_argument("--out", type=Path, help="folder of checkpoint and log; default: the cache")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the weights of the checkpoint, and end")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--evaluate-every", type=int, default=250, metavar="STEPS")
    parser.add_argument(
        "--normalise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="noise relative to mean and deviation of the embeddings; say it again with --export",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    train, held_out = (CaptionedCodes(args.cache, split, CANVAS) for split in ("train", "fresh"))
    model = load_model(args.model, torch.device("cpu"), torch.bfloat16)
    transformer = model.transformer
    transformer.cos, transformer.sin = transformer.cos.clone(), transformer.sin.clone()  # torch.compile: cast in place
    rows = transformer.embedding[model.first_code :][: model.num_codes]
    denoiser = Denoiser.new(rows, NoiseSchedule(), args.seed, normalise=args.normalise)
    trainer = Trainer(
        transformer,
        denoiser,
        model.first_code,
        num_steps=args.steps,
        lr=args.lr,
        warmup=args.warmup,
        decay=args.decay,
        seed=args.seed,
        compile=args.compile,
    )
    out = args.out or training_folder(args.cache, CANVAS)
    out.mkdir(parents=True, exist_ok=True)
    path, start_time = out / "sjd2.pt", time.perf_counter()
    start, recent = load_checkpoint(path, trainer), []
    if args.export:
        model.denoiser = denoiser
        save_fine_tuned(model, args.export, args.model.name)
        return
    with (
        open(out / "sjd2.jsonl", "a", encoding="utf-8") as log,
        trange(start, args.steps, initial=start, total=args.steps) as bar,
    ):
        for step in bar:
            rng = np.random.default_rng((args.seed, step))
            rows = rng.choice(len(train), args.batch_size, replace=False)
            recent.append(trainer.step(step, *train.batch(rows, rng, NULL_CAPTION_RATE)))
            entry = {}
            if (step + 1) % args.log_every == 0:
                clean, noisy, times = (torch.cat(parts) for parts in zip(*recent, strict=True))
                entry = {"clean": round(clean.mean().item(), 4), "noisy": bands(noisy, times)}
                bar.set_postfix(clean=entry["clean"], noisy=noisy.mean().item())
                recent = []
            if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
                entry |= evaluate(trainer, held_out, 64, args.batch_size)
            if entry:
                seconds = round(time.perf_counter() - start_time, 1)
                log.write(
                    json.dumps({"step": step + 1, "rate": trainer.rate(step), "seconds": seconds, **entry}) + "\n"
                )
                log.flush()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save_checkpoint(path, step + 1, trainer)


if __name__ == "__main__":
    main()
