"""Fine-tune an exported model for SJD2: it learns to read noisy embeddings in the place of drafts.

    python examples/emoji/train_sjd2.py --cache .cache/emoji --model sjd_engine/assets/emoji

With --export it writes what it has trained so far instead, as a folder that the Engine loads:

    python examples/emoji/train_sjd2.py --export out/emoji-sjd2

--plot FILE draws the log, which has a line of JSON for every few steps: nats behind clean tokens, and behind noisy ones
of five bands of noise. Resumes from its checkpoint.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from data import CANVAS, training_folder
from train_transformer import CaptionedCodes

from sjd_engine.models import load_model
from sjd_engine.train.log import plot
from sjd_engine.train.pictures import Pictures
from sjd_engine.train.run import LOG, add_arguments, export, train

NULL_CAPTION_RATE = 0.25  # guidance reads the law without a caption as often as the one with
NUM_HELD_OUT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--model", type=Path, default=Path("sjd_engine/assets/emoji"), help="exported folder")
    parser.add_argument("--out", type=Path, help="folder of checkpoint and log; default: the cache")
    add_arguments(parser, batch_size=8, lr=1.5e-3)
    parser.set_defaults(compile=True)
    args = parser.parse_args()
    args.out = args.out or training_folder(args.cache, CANVAS)
    if args.plot:
        plot(args.out / LOG, args.plot)
        return
    model = load_model(args.model, torch.device("cpu"), torch.bfloat16)
    if args.export:
        export(model, args, args.model.name)
        return
    pictures, fresh = (CaptionedCodes(args.cache, split, CANVAS) for split in ("train", "fresh"))

    def batch(step: int) -> Pictures:
        rng = np.random.default_rng((args.seed, step))
        rows = rng.choice(len(pictures), args.batch_size, replace=False)
        return Pictures(*pictures.batch(rows, rng, NULL_CAPTION_RATE))

    def held_out() -> Iterator[Pictures]:
        rng = np.random.default_rng(1234)
        for start in range(0, NUM_HELD_OUT, args.batch_size):
            yield Pictures(*fresh.batch(np.arange(start, start + args.batch_size), rng, null_rate=0.0))

    train(model, args, batch, held_out)


if __name__ == "__main__":
    main()
