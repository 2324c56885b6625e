"""Is a method lossless on this model? Draw images, teacher-force them, and test the tokens against the model's laws.

    python bench/lossless.py                                # emoji, every sampling method, 150,000 tokens a row
    python bench/lossless.py --tokens 20000 --methods sjd maximal sjd++
    python bench/lossless.py --model path/to/checkpoint --methods maximal --window 64 --top-k 1000

Fixed before anything is drawn, and printed with the numbers of the run:

    T2    z = sum(-log p(x) - H) / sqrt(sum Var), two-sided
    T3    chi-square of the sorted randomised PIT, 20 classes in each of 5 strata of entropy, added
    out   tokens outside the law's support (top-k, top-p), against a Poisson law of the floor's mean
    T4    images of `exact` that differ from those of `ar` with the same seeds, against the same
    floor mean total variation between the laws of windows and of passes of one token / of one pass over the image

A row is rejected where one of T2, T3 and out has p < 0.001 / (3 x rows). Each row draws with seeds of its own. Columns
`drift finds` and `shift finds` are the power: the smallest drift in nats a token, and the smallest total variation of
mass moved between classes of probability, that so many tokens show with 99 % chance. See `sjd_engine.lossless`.

Rows are kept in `--out`, one file each; the command begun again goes on where it stopped. The last line is one JSON
document. Exit status 1 where a method that is labelled lossless is rejected, or T4 is.
"""

import argparse
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from sjd_engine import Engine, SamplingParams
from sjd_engine.lossless import Evidence, examine, floor, oracle_p
from sjd_engine.methods import INITS, METHODS, TRAINING_FREE
from sjd_engine.models.base import Prompt
from sjd_engine.schedule import with_forced
from sjd_engine.testing import Scores, score_tokens

SIGNIFICANCE = 1e-3
THINGS = (
    "a red apple",
    "a dog face",
    "a yellow star",
    "a blue car",
    "a tree",
    "a soccer ball",
    "a pizza",
    "a sunflower",
)
GROUNDS = ("white", "grass", "wood", "brick", "stars", "gravel", "fur", "blue gradient")
PROMPTS = [f"{thing} on {ground}" for thing, ground in itertools.product(THINGS, GROUNDS)]
ORACLE = "oracle"  # the seeds of T4 and of the floor


@dataclass(frozen=True)
class Row:
    """One setting. `ar` has a window of one token and no drafts. tree: (K, D), or none."""

    method: str
    window: int
    init: str
    tree: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        tree = "" if self.tree is None else "-tree{}x{}".format(*self.tree)
        return f"{self.method}-{self.window}-{self.init}{tree}"


def first_seed(name: str) -> int:
    """Of 2^20 seeds that belong to `name`."""
    return zlib.crc32(name.encode()) << 20


def rows_of(methods: list[str], windows: list[int], inits: list[str], tree: tuple[int, int] | None) -> list[Row]:
    rows = []
    for method in methods:
        one = METHODS[method].one_token or METHODS[method].rows_at_once  # no drafts
        drafted = [(window, init) for window in windows for init in inits]
        rows += [Row(method, *setting) for setting in ([(1, "random")] if one else drafted)]
        if tree is not None and METHODS[method].takes_tree:
            rows += [Row(method, *setting, tree) for setting in drafted]
    return rows


class Sampler:
    """Draws and scores batches of images of one prompt each; batch b has prompt b of the list, in turn."""

    def __init__(self, engine: Engine, params: SamplingParams, batch: int):
        self.engine, self.model, self.params, self.batch = engine, engine.model, params, batch
        self.schedule = engine.model.schedule(*engine.model.image_size)

    def draw(self, row: Row, name: str, index: int) -> tuple[Tensor, list[int]]:
        """(codes [batch, rows * cols], passes of each image) of batch `index`, with the seeds of `name`."""
        first = first_seed(name) + index * self.batch
        out = self.engine.generate(
            PROMPTS[index % len(PROMPTS)],
            method=row.method,
            window_size=row.window,
            init=row.init,
            tree=row.tree,
            seed=first,
            num_images_per_prompt=self.batch,
            **asdict(self.params),
            output_type="codes",
            progress=False,
        )
        return out.token_ids, [stats.nfe for stats in out.stats]

    def prompt(self, index: int) -> Prompt:
        return self.model.build_prompt(PROMPTS[index % len(PROMPTS)], None, *self.model.image_size)

    def score(self, index: int, codes: Tensor) -> Scores:
        return score_tokens(self.model, self.prompt(index), codes, self.params, self.schedule)


class Kept:
    """Results of a run in a folder, one file for each name, written whole or not at all."""

    def __init__(self, folder: Path, setup: str):
        self.folder, self.setup = folder, setup
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, columns: list[str]) -> dict[str, list[np.ndarray]]:
        """What there is of `columns`. Raises: ValueError where it belongs to another run."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return {column: [] for column in columns}
        with np.load(path) as kept:
            if str(kept["setup"]) != self.setup:
                raise ValueError(f"{path}: holds another run, {kept['setup']}; name another --out, or remove the file")
            return {column: [kept[column]] for column in columns}

    def save(self, name: str, columns: dict[str, list[np.ndarray]]) -> None:
        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            np.savez(file, setup=np.array(self.setup), **{name: np.concatenate(v) for name, v in columns.items()})
        os.replace(partial, self.folder / f"{name}.npz")

    def fill(
        self,
        name: str,
        columns: list[str],
        count: int,
        at_once: int,
        draw: Callable[[int], list[np.ndarray]],
        bar: tqdm,
    ) -> dict[str, np.ndarray]:
        """The first `count` entries of each column, `at_once` to a batch; batches that are not there yet are drawn."""
        bar.set_description(name)
        kept = self.load(name, columns)
        done = sum(map(len, kept[columns[0]])) // at_once
        bar.update(min(done, count // at_once))
        for index in range(done, count // at_once):
            for column, values in zip(columns, draw(index), strict=True):
                kept[column].append(values)
            self.save(name, kept)
            bar.update()
        return {column: np.concatenate(parts)[:count] for column, parts in kept.items()}


SCORED = [field.name for field in fields(Scores)]


def run_row(sampler: Sampler, row: Row, num_batches: int, kept: Kept, bar: tqdm) -> tuple[Scores, float]:
    """(scores, mean passes of an image) of a row."""

    def draw(index: int) -> list[np.ndarray]:
        codes, nfe = sampler.draw(row, row.name, index)
        return [np.array(nfe), *(t.numpy() for t in vars(sampler.score(index, codes)).values())]

    columns = kept.fill(row.name, ["nfe", *SCORED], num_batches * sampler.batch, sampler.batch, draw, bar)
    return Scores(**{name: torch.from_numpy(columns[name]) for name in SCORED}), columns["nfe"].mean().item()


def run_oracle(sampler: Sampler, window: int, num_batches: int, kept: Kept, bar: tqdm) -> tuple[int, int]:
    """T4: (images of `exact` that differ from those of `ar`, tokens drawn until they did)."""

    def draw(index: int) -> list[np.ndarray]:
        mine, theirs = (sampler.draw(Row(m, w, "random"), ORACLE, index)[0] for m, w in (("exact", window), ("ar", 1)))
        return [(mine == theirs).cumprod(1).sum(1).numpy()]

    if not num_batches:
        return 0, 0
    num_images, num_tokens = num_batches * sampler.batch, sampler.schedule.rows * sampler.schedule.cols
    same = kept.fill(f"{ORACLE}-{window}", ["same"], num_images, sampler.batch, draw, bar)["same"]
    return int((same < num_tokens).sum()), int((same + 1).clip(max=num_tokens).sum())


def measure_floor(sampler: Sampler, window: int, kept: Kept, bar: tqdm) -> tuple[float, float]:
    """On one batch of images of `exact`, see `sjd_engine.lossless.floor`."""

    def draw(index: int) -> list[np.ndarray]:
        codes, _ = sampler.draw(Row("exact", window, "random"), ORACLE, index)
        ids = with_forced(codes, sampler.schedule)
        return [np.array([floor(sampler.model, sampler.prompt(index), ids, sampler.params, window)])]

    to_one, to_whole = kept.fill(f"floor-{window}", ["floor"], 1, 1, draw, bar)["floor"][0].tolist()
    return to_one, to_whole


def verdict(row: Row, evidence: Evidence) -> str:
    if METHODS[row.method].lossless:
        return "REJECTED" if evidence.rejected else "exact"
    return "lossy: found" if evidence.rejected else "lossy: not seen"


def show(results: list[dict], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    left = ("method", "init", "tree", "verdict")
    heads = ("method", "W", "init", "tree", "tokens", "NFE", "drift", "T2 z", "T2 p", "T3 chi2", "T3 p", "out", "out p")
    for head in (*heads, "drift finds", "shift finds", "verdict"):
        table.add_column(head, justify="left" if head in left else "right")
    for r in results:
        table.add_row(
            r["method"],
            str(r["window"]),
            r["init"],
            "" if r["tree"] is None else "{},{}".format(*r["tree"]),
            f"{r['num_tokens']:,}",
            f"{r['nfe']:.1f}",
            f"{r['drift']:+.4f}",
            f"{r['drift_z']:+.2f}",
            f"{r['drift_p']:.2g}",
            f"{r['pit_chi_square']:.0f}/{r['pit_freedom']}",
            f"{r['pit_p']:.2g}",
            str(r["outside"]),
            f"{r['outside_p']:.2g}",
            f"{r['detectable_drift']:.4f}",
            f"{r['detectable_shift']:.4f}",
            r["verdict"],
        )
    console.print(table)


def int_pair(text: str) -> tuple[int, int]:
    first, second = map(int, text.split(","))
    return first, second


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sampled = [name for name in METHODS if name != "jacobi"]  # greedy: its images follow no law but one
    usual = [name for name in sampled if name in TRAINING_FREE]
    parser.add_argument("--model", default="emoji", help="'emoji' or a checkpoint folder")
    parser.add_argument("--methods", nargs="+", default=usual, choices=sampled, metavar="METHOD")
    parser.add_argument("--window", type=int, nargs="+", default=[32])
    parser.add_argument("--init", nargs="+", default=["random"], choices=INITS, metavar="INIT")
    parser.add_argument("--tree", type=int_pair, metavar="K,D", help="rows with this tree beside those without")
    parser.add_argument("--tokens", type=int, default=150_000, help="of each row, or a few more: whole batches")
    parser.add_argument("--batch", type=int, default=8, help="images drawn together")
    parser.add_argument("--oracle-images", type=int, default=32, help="of T4; 0 leaves it out")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the engine's")
    parser.add_argument("--out", type=Path, default=Path("out/lossless"), help="folder of the rows")
    args = parser.parse_args()
    if min(args.tokens, args.batch, *args.window) < 1 or args.oracle_images < 0:
        parser.error("tokens, batch, window: expected >= 1; oracle-images: >= 0")
    return args


def main() -> int:
    args = parse()
    console = Console(width=170)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    engine = Engine(args.model, dtype=dtype, max_batch_size=args.batch)
    model = engine.model
    chosen = {name: getattr(args, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    params = replace(model.defaults.params, **{name: value for name, value in chosen.items() if value is not None})
    sampler = Sampler(engine, params, args.batch)
    per_batch = args.batch * len(sampler.schedule.image_positions)
    num_batches, oracle_batches = -(-args.tokens // per_batch), -(-args.oracle_images // args.batch)
    rows = rows_of(args.methods, args.window, args.init, args.tree)
    window = max(args.window)
    setup = json.dumps(
        {
            "model": args.model,
            "dtype": str(model.transformer.dtype),
            "batch": args.batch,
            "params": asdict(params),
            "prompts": zlib.crc32("\n".join(PROMPTS).encode()),
            "torch": torch.__version__,
        }
    )
    console.print(setup, soft_wrap=True)
    console.print(
        f"{len(rows)} rows of {num_batches * per_batch:,} tokens; rejected where p < "
        f"{SIGNIFICANCE / len(rows) / 3:.2g} in T2, T3 or out; T4 where p < {SIGNIFICANCE:g}, "
        f"{oracle_batches * args.batch} images"
    )
    kept, results = Kept(args.out, setup), []
    with tqdm(total=len(rows) * num_batches + oracle_batches + 1, unit="batch", file=sys.stderr) as bar:
        to_one, to_whole = measure_floor(sampler, window, kept, bar)
        for row in rows:
            scores, nfe = run_row(sampler, row, num_batches, kept, bar)
            seed = first_seed(row.name)
            evidence = examine(scores, seed=seed, significance=SIGNIFICANCE / len(rows), floor=to_whole)
            results.append({**asdict(row), "nfe": nfe, **asdict(evidence), "verdict": verdict(row, evidence)})
        different, tokens = run_oracle(sampler, window, oracle_batches, kept, bar)
    oracle = {"images": oracle_batches * args.batch, "different": different, "p": oracle_p(different, tokens, to_one)}
    show(results, console)
    console.print(f"floor, W {window}: {to_one:.2e} to passes of one token, {to_whole:.2e} to one pass")
    console.print(
        f"T4: {different} of {oracle['images']} images of `exact` differ from those of `ar`, p {oracle['p']:.2g}"
    )
    measured = {"floor": {"window": window, "one": to_one, "whole": to_whole}, "oracle": oracle}
    print(json.dumps({"setup": json.loads(setup), **measured, "rows": results}))
    return int(oracle["p"] < SIGNIFICANCE or any(r["verdict"] == "REJECTED" for r in results))


if __name__ == "__main__":
    sys.exit(main())
