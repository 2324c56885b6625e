"""Fine-tune any model that the Engine loads for SJD2: it learns to read noisy embeddings in the place of drafts.

    python examples/sjd2/train.py prompts.txt --model deepseek-ai/Janus-Pro-1B --out out/janus
    torchrun --nproc-per-node 8 examples/sjd2/train.py prompts.txt --model deepseek-ai/Janus-Pro-1B --out out/janus

The pictures are the model's own, drawn from its law for every line of the prompts; they lie in the folder of the
checkpoint and are drawn once. Or they are yours: --codes takes a .npy file [N, rows * cols] of image codes in raster
order, one picture for each line. With --export it writes what it has trained so far, as a folder that the Engine loads:

    python examples/sjd2/train.py prompts.txt --model deepseek-ai/Janus-Pro-1B --out out/janus --export out/janus-sjd2

--plot FILE draws the log, which has a line of JSON for every few steps: nats behind clean tokens, and behind noisy ones
of five bands of noise. Everything resumes from where it was interrupted.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sjd_engine import Engine
from sjd_engine.loading import default_dtype
from sjd_engine.models import load_model
from sjd_engine.train.log import plot
from sjd_engine.train.pictures import Pictures, collate
from sjd_engine.train.run import LOG, add_arguments, base_name, export, train
from sjd_engine.train.sharding import join, leave, num_processes, rank

PICTURES_A_FILE = 8
POLL_SECONDS = 1.0


def draw(args: argparse.Namespace, prompts: list[str], device: torch.device) -> Tensor:
    """[N, rows * cols] codes, a picture for each prompt. What lies in the folder already is not drawn again; several
    processes draw a share each."""
    folder = args.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    law = {"guidance_scale": args.guidance_scale, "top_k": args.top_k, "temperature": 1.0, "top_p": 1.0}
    arguments = {"height": args.height, "width": args.width, **law}
    agree(folder / "request.json", {"model": args.model, "seed": args.seed, **arguments, "prompts": prompts})
    files = [folder / f"{first:07d}.npy" for first in range(0, len(prompts), PICTURES_A_FILE)]
    missing = [file for file in files[rank() :: num_processes()] if not file.exists()]
    if missing:
        engine = Engine(args.model, device=device, max_batch_size=PICTURES_A_FILE)
        for file in tqdm(missing, desc="drawing", unit="file", disable=rank() > 0):
            numbers = range(len(prompts))[int(file.stem) :][:PICTURES_A_FILE]
            generation = engine.generate(
                [prompts[i] for i in numbers],
                seed=[args.seed + i for i in numbers],
                output_type="codes",
                progress=False,
                **arguments,
            )
            buffer = io.BytesIO()
            np.save(buffer, generation.token_ids.cpu().numpy().astype(np.int32))
            write_whole(file, buffer.getvalue())
    wait_for(*files)
    return torch.from_numpy(np.concatenate([np.load(file) for file in files])).long()


def agree(path: Path, request: dict) -> None:
    """Pictures that were drawn for another request are not mixed with these."""
    text = json.dumps(request, indent=2).encode()
    if not path.exists() and rank() == 0:
        write_whole(path, text)
    wait_for(path)
    if path.read_bytes() != text:
        raise SystemExit(f"--out: expected a new folder for other pictures; {path} says which {path.parent} holds")


def write_whole(path: Path, content: bytes) -> None:
    """The file is there when all of it is."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def wait_for(*paths: Path) -> None:
    """Until other processes have written them."""
    while not all(path.exists() for path in paths):
        time.sleep(POLL_SECONDS)


def read_codes(path: Path, count: int, num_tokens: int, num_codes: int) -> Tensor:
    """[N, rows * cols] codes of the user's."""
    codes = np.load(path)
    if codes.shape != (count, num_tokens):
        raise SystemExit(f"--codes: expected [{count}, {num_tokens}], a row for each prompt, got {list(codes.shape)}")
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= num_codes:
        found = f"{codes.dtype} from {codes.min()} to {codes.max()}"
        raise SystemExit(f"--codes: expected integers from 0 to {num_codes - 1}, got {found}")
    return torch.from_numpy(codes.astype(np.int64))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="a text file with a prompt in each line")
    parser.add_argument("--model", required=True, help="what Engine takes: a name, a checkpoint folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures, checkpoint and log")
    parser.add_argument("--codes", type=Path, metavar="FILE", help="a .npy file of your own pictures' codes")
    parser.add_argument("--pictures-per-prompt", type=int, default=1)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of the pictures drawn")
    parser.add_argument("--top-k", type=int, default=0, help="of the pictures drawn; 0 keeps all tokens")
    parser.add_argument("--height", type=int, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, help="pixels; default: the model's")
    parser.add_argument("--unconditional", type=float, default=0.1, help="share of the pictures behind no prompt")
    parser.add_argument("--held-out", type=int, default=2, metavar="BATCHES", help="not trained on")
    add_arguments(parser, batch_size=8, lr=2e-5)
    args = parser.parse_args(arguments)
    if args.plot:
        plot(args.out / LOG, args.plot)
        return
    device = join()
    lines = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [line for line in lines for _ in range(args.pictures_per_prompt)]
    drawn = None if args.codes or args.export else draw(args, prompts, device)
    model = load_model(args.model, device, default_dtype(device))
    if args.export:
        export(model, args, base_name(args.model, args.export))
        return
    size = args.height or model.image_size[0], args.width or model.image_size[1]
    schedule = model.schedule(*size)
    codes = drawn
    if codes is None:
        codes = read_codes(args.codes, len(prompts), schedule.rows * schedule.cols, model.num_codes)
    num_trained = len(codes) - args.held_out * args.batch_size
    if args.held_out < 1 or num_trained < args.batch_size:
        raise SystemExit(f"prompts: expected pictures for --held-out >= 1 batches and one more, got {len(codes)}")

    def pictures(numbers: np.ndarray, unconditional: np.ndarray) -> Pictures:
        built = [model.build_prompt(prompts[i], None, *size) for i in numbers]
        contexts = [p.unconditional if no else p.conditional for p, no in zip(built, unconditional, strict=True)]
        return collate(model, contexts, codes[numbers], schedule)

    def batch(step: int) -> Pictures:
        rng = np.random.default_rng((args.seed, step))
        numbers = rng.choice(num_trained, args.batch_size, replace=False)
        return pictures(numbers, rng.random(args.batch_size) < args.unconditional)

    def held_out() -> Iterator[Pictures]:
        for numbers in np.arange(num_trained, len(codes)).reshape(args.held_out, -1):
            yield pictures(numbers, np.zeros(args.batch_size, bool))

    train(model, args, batch, held_out)
    leave()


if __name__ == "__main__":
    main()
