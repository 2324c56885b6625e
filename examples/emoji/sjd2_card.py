"""Measure the model that was fine-tuned for SJD2: nats a token against its base, passes of an image, a sheet of samples.

    python examples/emoji/sjd2_card.py --cache .cache/emoji --model sjd_engine/assets/emoji-sjd2

Writes README.md and samples.png into the model's folder; the last line is one JSON document.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from model_card import SEEN, SHEET_GUIDANCE, nats_per_token
from PIL import Image, ImageDraw
from train_transformer import CaptionedCodes

from sjd_engine import Engine

STEPS, WINDOWS = (1, 2, 5, 10, 25), (16, 32, 64)
SHOWN = {"ar": {"method": "ar"}, "maximal": {"method": "maximal"}, "sjd2": {"method": "sjd2"}}
COLUMNS = SEEN[:8]


def passes(engine: Engine, prompts: list[str], seed: int, **arguments) -> float:
    """Mean NFE of an image of each prompt."""
    out = engine.generate(prompts, seed=seed, output_type="codes", progress=False, **arguments)
    return float(np.mean([stats.nfe for stats in out.stats]))


def table(engine: Engine, prompts: list[str], seed: int) -> dict[str, list[float]]:
    """Mean NFE by row, one number for each window."""
    rows = {name: {"method": name} for name in ("sjd", "maximal")}
    for verify in ("clean", "paper"):
        rows |= {f"sjd2 {verify}, K = {steps}": {"method": "sjd2", "steps": steps, "verify": verify} for steps in STEPS}
    return {
        name: [passes(engine, prompts, seed, window_size=window, **row) for window in WINDOWS]
        for name, row in rows.items()
    }


def sheet(engine: Engine, path: Path, seed: int) -> None:
    """One sample of each prompt by each method, at twice the size; not chosen."""
    side, left, top = 128, 64, 8
    picture = Image.new("RGB", (left + len(COLUMNS) * (side + 8), top + len(SHOWN) * (side + 8)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, arguments) in enumerate(SHOWN.items()):
        images = engine.generate(COLUMNS, seed=seed, guidance_scale=SHEET_GUIDANCE, progress=False, **arguments).images
        y = top + row * (side + 8)
        draw.text((4, y + side // 2), name, fill="black")
        for column, image in enumerate(images):
            picture.paste(image.resize((side, side), Image.Resampling.NEAREST), (left + column * (side + 8), y))
    picture.save(path, optimize=True)


CARD = """# emoji-sjd2: the emoji model, fine-tuned to read noise in the place of drafts

`Engine("emoji-sjd2").generate("a red apple", method="sjd2")`. The folder holds what differs from `emoji`: blocks, final
norm and the timestep encoding. Embedding, head, text and image tokenizers are those of the base.

| | |
|---|---|
| training | {steps} steps of {batch} pictures, each read twice: clean, and in noisy segments (`examples/emoji/train_sjd2.py`); Muon and AdamW, one CPU core |
| noise | rectified flow on embeddings of mean 0 and variance 1; all times in (0, 1], so that any number of levels K can be decoded with; K = {default} by default, the fewest passes of `clean` |
| data, licences | those of `emoji` |

## Held-out likelihood

Nats an image token in plain autoregressive reading, no guidance, {pictures} pictures each:

| pictures | emoji | emoji-sjd2 | |
|---|---|---|---|
| new, of concepts it was trained on | {fresh_base:.3f} | {fresh:.3f} | {fresh_gap:+.3f} |
| new, of concepts never shown | {held_base:.3f} | {held:.3f} | {held_gap:+.3f} |

## Passes of an image

Mean NFE of 256 tokens on this model, {prompts} prompts, guidance 2, temperature 1, the same seeds in every row. K is the number of
levels from noise to a draft. `clean` follows the model's law exactly; `paper` accepts drafts behind noise too, and is lossy.

| | {windows} |
|---|{rule}|
{rows}

## Samples

One for each prompt, not chosen: seed {seed}, guidance {guidance}; {columns}.

![samples](samples.png)

Written by `python examples/emoji/sjd2_card.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--model", type=Path, default=Path("sjd_engine/assets/emoji-sjd2"))
    parser.add_argument("--base", type=Path, default=Path("sjd_engine/assets/emoji"))
    parser.add_argument("--log", type=Path, help="of the training; default: in the cache")
    parser.add_argument("--batch-size", type=int, default=8, help="of the training")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tuned, base = Engine(args.model, device="cpu"), Engine(args.base, device="cpu")
    fresh, held = (CaptionedCodes(args.cache, split) for split in ("fresh", "held_out"))
    nats = {
        name: nats_per_token(engine.model, data, args.pictures)
        for name, engine, data in (
            ("fresh_base", base, fresh),
            ("fresh", tuned, fresh),
            ("held_base", base, held),
            ("held", tuned, held),
        )
    }
    log = (args.log or args.cache / "sjd2.jsonl").read_text().splitlines()
    found = table(tuned, SEEN, args.seed)
    sheet(tuned, args.model / "samples.png", args.seed)
    facts = {
        **nats,
        "fresh_gap": nats["fresh"] - nats["fresh_base"],
        "held_gap": nats["held"] - nats["held_base"],
        "steps": json.loads(log[-1])["step"],
        "batch": args.batch_size,
        "default": tuned.model.denoiser.schedule.steps,
        "pictures": args.pictures,
        "prompts": len(SEEN),
        "windows": " | ".join(f"W = {window}" for window in WINDOWS),
        "rule": "|".join("---" for _ in WINDOWS),
        "rows": "\n".join(f"| {name} | " + " | ".join(f"{n:.1f}" for n in row) + " |" for name, row in found.items()),
        "seed": args.seed,
        "guidance": SHEET_GUIDANCE,
        "columns": ", ".join(COLUMNS),
    }
    (args.model / "README.md").write_text(CARD.format(**facts))
    print(json.dumps({**facts, "nfe": found}))


if __name__ == "__main__":
    main()
