"""All decoding methods and transformers' own generate on the same weights, prompts and machine, in one run.

    python bench/generate.py                      # 8 prompts, every method, several windows; a few minutes on a laptop
    python bench/generate.py --prompts 32 --windows 16 32 --methods sjd maximal
    python bench/generate.py --batch 1,2,4,8,16   # images a second and latency of continuous batching, and memory
    python bench/generate.py --random simplear-0.5b,janus-1b   # passes at the shapes of real models: bench/forward.py

Columns:
    NFE           forward passes for an image of 256 tokens, the prompt's included; a guided pair counts once
    tokens/pass   step compression, 256 / NFE
    ... detail    the same for tokens that are not blank: each pass is shared equally among the tokens it commits, and
                  only the shares of tokens with more than 1 nat of entropy count. Blank background flatters.
    seconds       for an image, one at a time, decoding only
    vs ar / HF    seconds of this engine's `ar` / of transformers' generate over this row's
    log p         mean log-probability of the committed tokens under one-token-a-pass sampling, nats
    drift z       surprisal martingale sum(-log p(x) - H) / sqrt(sum Var): N(0, 1) for a lossless method
    = ar          share of tokens equal to those of `ar` with the same seed
    overhead      share of an iteration spent outside the transformer and its head

    images/s      with `--batch`: the same images, so many at once, over the seconds of all
    latency       mean seconds from the moment an image begins until it is complete
    MB/image      of the key/value cache, when all images have prompts of their own, and when they share one

Prompts take turns within the run, so that a slow moment of the machine falls on all methods. The last line is one JSON
document.
"""

import argparse
import json
import runpy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sjd_engine import Engine
from sjd_engine.methods import METHODS
from sjd_engine.models import ImageModel, checkpoint_folder
from sjd_engine.outputs import ImageStats
from sjd_engine.testing import score_tokens

PROMPTS = [
    "a red apple on grass",
    "noto soccer ball on brick",
    "twemoji smiling face with sunglasses on white",
    "fluent red heart on wood",
    "a tree on blue gradient",
    "noto dog face on gravel",
    "twemoji pizza on stars",
    "fluent sunflower on fur",
    "a blue car on gray",
    "noto strawberry on wood",
    "twemoji crescent moon on stars",
    "fluent cat face on grass",
    "a yellow star on purple",
    "noto basketball on brick",
    "twemoji mushroom on grass",
    "fluent rainbow on light blue",
]
DETAIL_NATS = 1.0


@dataclass
class Row:
    """What one setting did, one entry for each prompt."""

    method: str
    window: int
    init: str = ""
    nfe: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    detail: list[float] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    equal_to_ar: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)

    def summary(self, num_tokens: int) -> dict[str, float | int | str]:
        def mean(values: list[float]) -> float | None:
            return round(statistics.fmean(values), 4) if values else None

        drift = sum(self.surprise) / sum(self.variance) ** 0.5 if self.variance else None
        return {
            "method": self.method,
            "window": self.window,
            "init": self.init,
            "nfe": mean(self.nfe),
            "step_compression": round(num_tokens * len(self.nfe) / sum(self.nfe), 3),
            "step_compression_detail": mean(self.detail),
            "seconds": mean(self.seconds),
            "log_prob": mean(self.log_prob),
            "drift_z": None if drift is None else round(drift, 2),
            "equal_to_ar": mean(self.equal_to_ar),
            "overhead": mean(self.overhead),
        }


def detail_compression(stats: ImageStats, entropies: Tensor) -> float:
    """Tokens for each pass, counting only tokens with more than DETAIL_NATS of entropy and their share of each pass."""
    per_pass = torch.tensor(stats.committed_per_pass)
    shares = 1.0 / per_pass[torch.from_numpy(stats.acceptance_map).flatten()]
    detail = entropies > DETAIL_NATS
    return (detail.sum() / shares[detail].sum()).item() if detail.any() else float("nan")


class TransformerClock:
    """Seconds spent in the transformer and its head while open."""

    def __init__(self, engine: Engine):
        self.transformer, self.seconds = engine.model.transformer, 0.0

    def _timed(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: Tensor) -> Tensor:
            started = time.perf_counter()
            out = call(*arguments)
            self.seconds += time.perf_counter() - started
            return out

        return timed

    def __enter__(self) -> "TransformerClock":
        self.seconds = 0.0
        self.transformer.forward = self._timed(self.transformer.forward)
        self.transformer.logits = self._timed(self.transformer.logits)
        return self

    def __exit__(self, *_: object) -> None:
        del self.transformer.forward, self.transformer.logits


def run_engine(engine: Engine, row: Row, prompt: str, seed: int, ar_codes: Tensor | None, measured: bool) -> Tensor:
    """Decode one image, one at a time, and note it in `row`; returns its codes."""
    while engine.scheduler.prompts.evict():  # every run computes its prompt
        pass
    with TransformerClock(engine) as clock:
        out = engine.generate(
            prompt,
            method=row.method,
            window_size=row.window,
            init=row.init or "random",
            seed=seed,
            output_type="codes",
            progress=False,
        )
    stats, codes = out.stats[0], out.token_ids[0]
    if measured:
        contexts, params = (
            engine.model.build_prompt(prompt, None, *engine.model.image_size),
            engine.model.defaults.params,
        )
        scored = score_tokens(engine.model, contexts, codes[None], params)
        row.nfe.append(stats.nfe)
        row.seconds.append(stats.seconds)
        row.overhead.append(1 - clock.seconds / stats.seconds)
        row.detail.append(detail_compression(stats, scored.entropies[0]))
        row.log_prob.append(scored.log_probs.mean().item())
        row.surprise.append((-scored.log_probs - scored.entropies).sum().item())
        row.variance.append(scored.variances.sum().item())
        if ar_codes is not None:
            row.equal_to_ar.append((codes == ar_codes).float().mean().item())
    return codes


class TransformersGenerate:
    """`model.generate` of transformers on the same checkpoint: guidance, image tokens only, sampling."""

    def __init__(self, name: str, engine: Engine, dtype: torch.dtype):
        import transformers

        transformers.logging.set_verbosity_error()
        self.engine, self.transformers = engine, transformers
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint_folder(name), dtype=dtype, attn_implementation="sdpa"
        )
        self.num_tokens = engine.model.schedule(*engine.model.image_size).num_tokens
        self.settings: dict[str, Callable[[str, int], Tensor]] = {
            "guidance_scale= (two passes a token)": self.two_passes,
            "guided pair in one batch": self.one_batch,
        }
        self.run = self.one_batch

    def _generate(
        self, ids: Tensor, mask: Tensor, seed: int, processors: list, sample: bool, **extra: object
    ) -> Tensor:
        torch.manual_seed(seed)
        return self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=sample,
            top_k=0 if sample else None,
            max_new_tokens=self.num_tokens,
            min_new_tokens=self.num_tokens,
            pad_token_id=0,
            logits_processor=self.transformers.LogitsProcessorList(processors),
            **extra,
        )

    def two_passes(self, prompt: str, seed: int) -> Tensor:
        """transformers' own guidance: the unconditional pass is a second call of the model."""
        model = self.engine.model
        contexts = model.build_prompt(prompt, None, *model.image_size)
        first = model.first_code

        def image_only(_: Tensor, scores: Tensor) -> Tensor:
            out = torch.full_like(scores, float("-inf"))
            out[:, first : first + model.num_codes] = scores[:, first : first + model.num_codes]
            return out

        ids = torch.tensor([contexts.conditional.ids])
        negative = torch.tensor([contexts.unconditional.ids])
        scale = model.defaults.params.guidance_scale
        return self._generate(
            ids,
            torch.ones_like(ids),
            seed,
            [image_only],
            sample=True,
            guidance_scale=scale,
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative),
        )

    def one_batch(self, prompt: str, seed: int) -> Tensor:
        """Conditional and unconditional rows of one batch; the processor draws the token for both."""
        model = self.engine.model
        contexts = model.build_prompt(prompt, None, *model.image_size)
        first, scale = model.first_code, model.defaults.params.guidance_scale

        def draw_for_both(_: Tensor, scores: Tensor) -> Tensor:
            conditional, unconditional = scores[:, first : first + model.num_codes].float()
            probs = (unconditional + scale * (conditional - unconditional)).softmax(-1)
            out = torch.full_like(scores, float("-inf"))
            out[:, first + torch.multinomial(probs, 1)] = 0.0
            return out

        width = len(contexts.conditional)
        ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
        for row, context in enumerate((contexts.conditional, contexts.unconditional)):
            ids[row, width - len(context) :], mask[row, width - len(context) :] = torch.tensor(context.ids), 1
        return self._generate(ids, mask, seed, [draw_for_both], sample=False)

    def choose_fastest(self, prompt: str) -> tuple[str, dict[str, float]]:
        """Time both settings once, after a warm-up, and keep the faster."""
        seconds = {}
        for name, setting in self.settings.items():
            seconds[name] = min(self.seconds(setting, prompt, seed) for seed in range(2))
        fastest = min(seconds, key=seconds.__getitem__)
        self.run = self.settings[fastest]
        return fastest, {name: round(value, 3) for name, value in seconds.items()}

    @staticmethod
    def seconds(setting: Callable[[str, int], Tensor], prompt: str, seed: int) -> float:
        started = time.perf_counter()
        setting(prompt, seed)
        return time.perf_counter() - started


def rows_of(args: argparse.Namespace) -> list[Row]:
    rows = [Row("ar", 1)]
    for method in args.methods:
        windows = args.windows if method not in ("gumbel", "jacobi") else args.windows[1:2] or args.windows[:1]
        rows += [Row(method, window) for window in windows]
    if "maximal" in args.methods:
        rows += [Row("maximal", window, init) for init in args.inits for window in args.windows]
    return rows


def run_batches(args: argparse.Namespace, model: ImageModel, console: Console) -> list[dict]:
    """The same images, `size` at once, for every size; prints a table."""
    count = max(*args.batch, len(PROMPTS))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    engines = {size: Engine(model, max_batch_size=size, page_size=args.page_size) for size in args.batch}
    seconds: dict[int, list[float]] = {size: [] for size in args.batch}
    latency: dict[int, list[float]] = {size: [] for size in args.batch}
    arguments = {"window_size": args.windows[0], "output_type": "codes", "progress": False}
    for engine in engines.values():
        engine.generate(prompts[: engine.max_batch_size], **arguments)
    for _ in range(args.repeats):
        for size, engine in engines.items():
            while engine.scheduler.prompts.evict():
                pass
            started = time.perf_counter()
            out = engine.generate(prompts, seed=args.seed, **arguments)
            seconds[size].append(time.perf_counter() - started)
            latency[size].append(statistics.fmean(stats.seconds for stats in out.stats))

    def megabytes(engine: Engine, prompts: list[str]) -> float:
        """Of the cache, for each of so many images under way at once."""
        pool = engine.scheduler.prompts.kv_cache
        while engine.scheduler.prompts.evict():
            pass
        number = engine.submit(prompts, window_size=args.windows[0], output_type="codes")
        engine.step()
        used = pool.num_pages - pool.num_free_pages
        engine.cancel(number)
        return used * pool.pages[:, 0].nbytes / 1e6 / len(prompts)

    table = Table(box=None, pad_edge=False)
    for column in ("at once", "images/s", "vs one at a time", "latency s", "MB/image", "MB/image, one prompt"):
        table.add_column(column, justify="right")
    rows = []
    base = count / min(seconds[args.batch[0]])
    for size, engine in engines.items():
        rate = count / min(seconds[size])
        row = {
            "batch": size,
            "images_per_second": round(rate, 3),
            "vs_first": round(rate / base, 3),
            "latency": round(statistics.median(latency[size]), 3),
            "mb_per_image": round(megabytes(engine, prompts[:size]), 3),
            "mb_per_image_shared": round(megabytes(engine, prompts[:1] * size), 3),
        }
        rows.append(row)
        table.add_row(*map(str, row.values()))
    console.print(
        f"{count} images, maximal, W {args.windows[0]}, pages of {args.page_size} tokens, best of {args.repeats} runs"
    )
    console.print(table)
    return rows


def show(results: list[dict], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ("method", "W", "init", "NFE", "tokens/pass", "… detail", "seconds", "vs ar", "vs HF", "log p", "drift z")
    for column in (*columns, "= ar", "overhead"):
        table.add_column(column, justify="left" if column in ("method", "init") else "right")

    def text(value: float | None, pattern: str) -> str:
        return "" if value is None else format(value, pattern)

    for r in results:
        table.add_row(
            r["method"],
            str(r["window"]),
            r["init"],
            text(r["nfe"], ".1f"),
            text(r["step_compression"], ".2f"),
            text(r["step_compression_detail"], ".2f"),
            text(r["seconds"], ".3f"),
            text(r["vs_ar"], ".2f"),
            text(r["vs_transformers"], ".2f"),
            text(r["log_prob"], ".3f"),
            text(r["drift_z"], "+.1f"),
            text(r["equal_to_ar"], ".0%"),
            text(r["overhead"], ".0%"),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--methods", nargs="+", default=["jacobi", "sjd", "sjd++", "maximal", "gumbel", "exact"])
    parser.add_argument(
        "--inits", nargs="*", default=["above-sample", "left-sample"], help="for maximal, beside random"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the engine's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch", type=lambda text: [int(size) for size in text.split(",")], help="sizes; the first is the base"
    )
    parser.add_argument("--page-size", type=int, default=16, help="with --batch")
    parser.add_argument("--repeats", type=int, default=3, help="with --batch")
    parser.add_argument("--random", type=lambda text: text.split(","), metavar="MODEL,...", help="see bench/forward.py")
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    unknown = set(args.methods) - set(METHODS)
    if unknown or args.prompts < 1:
        parser.error(f"methods: {', '.join(METHODS)}; prompts >= 1")

    console = Console(width=140)
    if args.random:
        forward = runpy.run_path(str(Path(__file__).with_name("forward.py")))
        if unknown := set(args.random) - set(forward["SHAPES"]):
            parser.error(f"random: expected some of {', '.join(forward['SHAPES'])}, got {', '.join(sorted(unknown))}")
        print(json.dumps({"random": forward["run_shapes"](args.random, console)}))
        return
    engine = Engine(args.model, device="cpu", dtype=getattr(torch, args.dtype) if args.dtype else None)
    dtype = engine.model.transformer.dtype
    if args.batch:
        print(json.dumps({"batch": run_batches(args, engine.model, console)}))
        return
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(args.prompts)]
    rows = rows_of(args)
    for row in (rows[0], *rows[1:3]):
        run_engine(engine, row, prompts[0], args.seed, None, measured=False)

    other, baseline, hf_row = None, None, Row("transformers generate", 1)
    if args.transformers:
        other = TransformersGenerate(args.model, engine, dtype)
        baseline = other.choose_fastest(prompts[0])
    for i, prompt in enumerate(prompts):
        seed = args.seed + i
        if other is not None:
            hf_row.seconds.append(other.seconds(other.run, prompt, seed))
            hf_row.nfe.append(other.num_tokens)
        ar_codes = None
        for row in rows:
            codes = run_engine(engine, row, prompt, seed, ar_codes, measured=True)
            ar_codes = codes if row.method == "ar" else ar_codes

    num_tokens = engine.model.schedule(*engine.model.image_size).num_tokens
    results = [row.summary(num_tokens) for row in (([hf_row] if other else []) + rows)]
    ar_seconds = next(r["seconds"] for r in results if r["method"] == "ar")
    hf_seconds = results[0]["seconds"] if other else None
    for r in results:
        r["vs_ar"] = round(ar_seconds / r["seconds"], 3)
        r["vs_transformers"] = round(hf_seconds / r["seconds"], 3) if hf_seconds else None

    params = engine.model.defaults.params
    console.print(
        f"{args.model}, {len(prompts)} prompts, {num_tokens} tokens, {dtype}, {torch.get_num_threads()} threads, "
        f"guidance {params.guidance_scale}, temperature {params.temperature}, top-k {params.top_k}, "
        f"torch {torch.__version__}"
    )
    if baseline:
        console.print(f"transformers generate: {baseline[0]}; seconds of each setting {baseline[1]}")
    show(results, console)
    setup = {
        "model": args.model,
        "prompts": prompts,
        "dtype": str(dtype),
        "params": asdict(params),
        "transformers": baseline,
    }
    print(json.dumps({"setup": setup, "rows": results}))


if __name__ == "__main__":
    main()
