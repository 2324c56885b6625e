"""A fine-tuning for SJD2 from its arguments to its export, whatever the pictures come from."""

import os
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import trange

from sjd_engine.denoise import Denoiser, NoiseSchedule
from sjd_engine.models import BUNDLED, ImageModel
from sjd_engine.models.fine_tuned import save_fine_tuned
from sjd_engine.train import log
from sjd_engine.train.checkpoints import load_checkpoint, save_checkpoint
from sjd_engine.train.pictures import Pictures
from sjd_engine.train.sharding import num_processes, rank
from sjd_engine.train.trainer import Nats, Trainer, joined

CHECKPOINT, LOG = "sjd2.pt", "sjd2.jsonl"


def add_arguments(parser: ArgumentParser, *, batch_size: int, lr: float) -> None:
    """Those of every fine-tuning, with the defaults that differ."""
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the weights of the checkpoint, and end")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the log, and end")
    parser.add_argument("--levels", type=int, default=1, metavar="K", help="of noise; the default in decoding")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--evaluate-every", type=int, default=250, metavar="STEPS")
    parser.add_argument(
        "--normalise",
        action=BooleanOptionalAction,
        default=True,
        help="noise relative to mean and deviation of the embeddings",
    )
    parser.add_argument("--compile", action=BooleanOptionalAction, default=False)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters; say it again with --export")


def new_trainer(model: ImageModel, args: Namespace) -> Trainer:
    """With a denoiser that knows nothing yet. args: of `add_arguments`."""
    transformer = model.transformer
    if args.compile:  # `Transformer.cast` changed them in place, which torch.compile refuses
        transformer.cos, transformer.sin = transformer.cos.clone(), transformer.sin.clone()
    rows = transformer.embedding[model.first_code :][: model.num_codes]
    denoiser = Denoiser.new(rows, NoiseSchedule(steps=args.levels), args.seed, normalise=args.normalise)
    return Trainer(
        transformer,
        denoiser.to(model.device),
        model.first_code,
        num_steps=args.steps,
        lr=args.lr,
        warmup=args.warmup,
        decay=args.decay,
        seed=args.seed,
        compile=args.compile,
        gradient_checkpointing=args.gradient_checkpointing,
        lora=args.lora,
    )


def export(model: ImageModel, args: Namespace, base: str) -> None:
    """Write the weights of the checkpoint in `args.out` to `args.export`.

    Args:
        base: name of the model, see `save_fine_tuned`.
    """
    if num_processes() > 1:
        raise SystemExit("--export: expected one process; start it without torchrun")
    trainer, path = new_trainer(model, args), args.out / CHECKPOINT
    if not load_checkpoint(path, trainer):
        raise SystemExit(f"--export: expected a checkpoint, got no {path}; train first")
    trainer.merge_adapters()
    model.denoiser = trainer.denoiser
    save_fine_tuned(model, args.export, base)


def base_name(model: str, folder: Path) -> str:
    """What a model is called in an export to `folder`: by its name, or by the way from beside the export to it."""
    if model in BUNDLED or not Path(model).exists():
        return model
    return os.path.relpath(model, folder.parent)


def train(
    model: ImageModel, args: Namespace, batch: Callable[[int], Pictures], held_out: Callable[[], Iterable[Pictures]]
) -> None:
    """Train from the checkpoint in `args.out` on, with a bar, a log and checkpoints.

    Args:
        args: of `add_arguments`, and `out`, the folder of checkpoint and log.
        batch: step -> its pictures, as many in every step; a resumed run asks for the same.
        held_out: batches that are not trained on.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = new_trainer(model, args)
    start = load_checkpoint(args.out / CHECKPOINT, trainer)
    start_time = time.perf_counter()
    recent: list[Nats] = []
    with trange(start, args.steps, initial=start, total=args.steps, disable=rank() > 0) as bar:
        for step in bar:
            number, last = step + 1, step + 1 == args.steps
            recent.append(trainer.step(step, batch(step)))
            entry: dict[str, Any] = {}
            if number % args.log_every == 0:
                nats, recent = joined(recent), []
                entry = log.summary(nats)
                bar.set_postfix(clean=log.mean(nats.clean), noisy=log.mean(nats.noisy))
            if number % args.evaluate_every == 0 or last:
                entry |= log.summary(trainer.evaluate(held_out()), prefix="held_out_")
            if entry:
                seconds = round(time.perf_counter() - start_time, 1)
                entry = {"step": number, "rate": trainer.rate(step), "seconds": seconds, **entry}
                log.append(args.out / LOG, entry)
            if number % args.save_every == 0 or last:
                save_checkpoint(args.out / CHECKPOINT, number, trainer)
