"""The decoding methods on the same weights, prompts and machine: experiments, each of which is one command.

    python bench/generate.py                          # --experiment methods: every method, without and with top-k
    python bench/generate.py --experiment window      # seconds and passes against the window, and window_size="auto"
    python bench/generate.py --experiment topk        # … against the tokens that top-k keeps
    python bench/generate.py --experiment init        # … for every law of entering drafts
    python bench/generate.py --experiment refinement  # the refresh rules, and how far laws move from pass to pass
    python bench/generate.py --experiment resolution --models emoji FOLDER   # … against the number of tokens
    python bench/generate.py --experiment batch --sizes 1 2 4 8 16           # rate, latency and memory of batching
    python bench/generate.py --experiment control     # the same on text, where it should not help: SmolLM2-135M
    python bench/generate.py --synthetic-accept 0.8   # the engine alone, without a model's luck or its time
    python bench/generate.py --random simplear-0.5b,janus-1b   # passes at the shapes of real models: bench/forward.py

With `--out DIR` an experiment leaves DIR/NAME.json, NAME.csv and figures. The last line is one JSON document.

Columns:
    NFE           forward passes for an image, the prompt's included; a guided pair counts once
    tok/pass      step compression, tokens / NFE
    detail        the same for tokens that are not blank: each pass is shared equally among the tokens it commits, and
                  only the shares of tokens with more than 1 nat of entropy count. Blank background flatters.
    seconds       for an image, one at a time, decoding only
    … vs X        how many times fewer passes or seconds than X with the same window and top-k; HF: transformers
    s vs best W   seconds as a multiple of those of the method's fastest fixed window
    log p, sd     mean and deviation of the log-probability of the tokens under one-token-a-pass sampling, nats
    drift z       surprisal martingale sum(-log p(x) - H) / sqrt(sum Var): N(0, 1) for a lossless method
    = ar          share of tokens equal to those of `ar` with the same seed
    overhead      share of an iteration spent outside the transformer and its head
"""

import argparse
import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console

from sjd_engine.methods import METHODS

QUICK_PROMPTS = 4


def load_experiments() -> ModuleType:
    """The package experiments/, by its path: this folder is not searched."""
    folder = Path(__file__).with_name("experiments")
    spec = importlib.util.spec_from_file_location("bench_experiments", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def window(text: str) -> int | str:
    return text if text == "auto" else int(text)


def parse(argv: Sequence[str] | None, experiments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=experiments, default="methods")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--models", nargs="+", default=["emoji"], help="with resolution")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PROMPTS} prompts, one repeat")
    parser.add_argument("--minutes", type=float, default=25.0, help="after which no further prompt begins")
    parser.add_argument("--windows", type=window, nargs="+", help="tokens of a pass, or auto")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="beside ar; default: the experiment's")
    parser.add_argument("--inits", nargs="*", help="of init; with methods: more rows for maximal")
    parser.add_argument("--top-ks", type=int, nargs="+", help="0 keeps all")
    parser.add_argument("--variants", nargs="*", default=[], help="with methods: 'sjd++ reuse_threshold=0.1'")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the engine's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True, help="with methods")
    parser.add_argument("--sizes", type=int, nargs="+", help="of batches; the first is the base")
    parser.add_argument("--batch", type=sizes, metavar="SIZE,...", help="--experiment batch --sizes SIZE ...")
    parser.add_argument("--page-size", type=int, default=16, help="with batch")
    parser.add_argument("--repeats", type=int, default=3, help="with batch and synthetic")
    parser.add_argument("--new-tokens", type=int, default=64, help="with control")
    parser.add_argument("--synthetic-accept", type=float, metavar="P", help="--experiment synthetic; 0 < P <= 1")
    parser.add_argument("--random", type=lambda text: text.split(","), metavar="MODEL,...", help="see bench/forward.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for JSON, CSV and figures")
    args = parser.parse_args(argv)
    if args.batch:
        args.experiment, args.sizes = "batch", args.batch
    if args.synthetic_accept is not None:
        args.experiment = "synthetic"
    if args.quick:
        args.prompts, args.repeats = min(args.prompts, QUICK_PROMPTS), 1
    args.sizes = args.sizes or ([1, 8] if args.experiment == "synthetic" else [1, 2, 4, 8, 16])
    if args.experiment == "synthetic" and not (args.synthetic_accept and 0 < args.synthetic_accept <= 1):
        parser.error("synthetic: expected --synthetic-accept P with 0 < P <= 1")
    if args.out and importlib.util.find_spec("matplotlib") is None:
        parser.error("out: figures need matplotlib; pip install 'sjd-engine[bench]'")
    counts = {"prompts": args.prompts, "repeats": args.repeats, "new-tokens": args.new_tokens}
    fixed = [size for size in args.windows or () if size != "auto"]
    if args.experiment in ("synthetic", "control") and len(fixed) < len(args.windows or ()):
        parser.error(f"windows: expected numbers with {args.experiment}, got auto")
    counts |= {"windows": min(fixed, default=1), "sizes": min(args.sizes)}
    for name, value in counts.items():
        if value < 1:
            parser.error(f"{name}: expected >= 1, got {value}")
    return args


def run_shapes(names: list[str], console: Console) -> dict:
    """Passes at the shapes of real models."""
    forward = runpy.run_path(str(Path(__file__).with_name("forward.py")))
    if unknown := set(names) - set(forward["SHAPES"]):
        raise SystemExit(f"random: expected some of {', '.join(forward['SHAPES'])}, got {', '.join(sorted(unknown))}")
    return {"random": forward["run_shapes"](names, console)}


def main(argv: Sequence[str] | None = None) -> None:
    experiments = load_experiments()
    args = parse(argv, list(experiments.EXPERIMENTS))
    console = Console(width=200)
    if args.random:
        print(json.dumps(run_shapes(args.random, console)))
        return
    result = experiments.EXPERIMENTS[args.experiment](args)
    result.show(console)
    if args.out:
        written = experiments.report.write(result, args.out, args.experiment)
        written += experiments.draw(result.document, args.out)
        console.print("written: " + ", ".join(map(str, written)))
    print(experiments.report.summary(result.document))


if __name__ == "__main__":
    main()
