"""Measure the exported model and write its card: nats a token, calibration curve, a grid of samples.

python examples/emoji/model_card.py --cache .cache/emoji --model sjd_engine/assets/emoji
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from prepare import load_encoder
from train_tokenizer import to_tensor
from train_transformer import CaptionedCodes

from sjd_engine import Engine, SamplingParams
from sjd_engine.models.base import Context, ImageModel, Prompt
from sjd_engine.testing import score_tokens, teacher_forced_logits

DISTANCES = (1, 3, 5, 7, 16)
SHEET_GUIDANCE = 3.0  # for people to look at; the default of the model is 2
SEEN = [
    "a red apple on white",
    "noto soccer ball on grass",
    "twemoji pizza on wood",
    "fluent red heart on brick",
    "a cat face on stars",
    "noto sunflower on light blue",
    "twemoji smiling face with smiling eyes on purple",
    "fluent strawberry on gravel",
    "a basketball on brick",
    "noto crescent moon on stars",
    "twemoji mushroom on grass",
    "fluent blue square on wood",
    "a dog face on yellow",
    "noto four leaf clover on fur",
    "twemoji red car on gray",
    "fluent star on blue gradient",
]
UNSEEN = ["purple heart on white", "noto purple heart on wood", "green square on grass", "fluent green square on stars"]


def nats_per_token(model: ImageModel, data: CaptionedCodes, count: int) -> float:
    """Mean surprisal of the first `count` pictures under the model's own law, without guidance."""
    rng = np.random.default_rng(1234)
    total = 0.0
    for row in range(count):
        context = Context.of_tokens(data.prompt_ids(row, rng, null_rate=0.0))
        codes = torch.from_numpy(data.codes[row : row + 1].astype(np.int64))
        total -= score_tokens(model, Prompt(context, context), codes, SamplingParams()).log_probs.mean().item()
    return total / count


def calibration(model: ImageModel, data: CaptionedCodes, count: int) -> dict[int, float]:
    """Mean total variation of the next-token law after one token `distance` before it becomes another likely one."""
    rng, generator = np.random.default_rng(99), torch.Generator().manual_seed(99)
    moved: dict[int, list[float]] = {distance: [] for distance in DISTANCES}
    for row in range(count):
        context = Context.of_tokens(data.prompt_ids(row, rng, null_rate=0.0))
        codes = torch.from_numpy(data.codes[row].astype(np.int64))
        original = teacher_forced_logits(model, context, codes[None])[0].softmax(-1)
        position = int(rng.integers(32, len(codes)))
        changed = codes.repeat(len(DISTANCES), 1)
        for i, distance in enumerate(DISTANCES):
            law = original[position - distance].clone()
            law[codes[position - distance]] = 0
            changed[i, position - distance] = torch.multinomial(law, 1, generator=generator)
        after = teacher_forced_logits(model, context, changed)[:, position].softmax(-1)
        for distance, law in zip(DISTANCES, after, strict=True):
            moved[distance].append(0.5 * (law - original[position]).abs().sum().item())
    return {distance: float(np.mean(values)) for distance, values in moved.items()}


def reconstruction_mse(model: ImageModel, folder: Path, data: CaptionedCodes, count: int = 256) -> float:
    """Mean squared error of the image tokenizer on fresh composites, pixels in [-1, 1]."""
    rng = np.random.default_rng(7)
    images = to_tensor([data.captions.compose(int(data.glyph[row]), rng)[1] for row in range(count)])
    with torch.inference_mode():
        codes = load_encoder(folder)(images)[1]
        return (model.detokenizer(codes) - images).square().mean().item()


def sample_grid(engine: Engine, prompts: list[str], path: Path, columns: int, seed: int) -> None:
    """A captioned picture of one sample for each prompt, at twice the size."""
    images = engine.generate(prompts, seed=seed, guidance_scale=SHEET_GUIDANCE, progress=False).images
    side, text = 128, 30
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + text + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (side + text + 8)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        words, lines = prompt.split(), [""]
        for word in words:
            if draw.textlength(f"{lines[-1]} {word}") > side:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.text((x, y + side + 2), "\n".join(lines[:2]), fill="black")
    sheet.save(path, optimize=True)


CARD = """# emoji: a small text-to-image model for decoding research

Captions such as "twemoji red apple on wood" to 64x64 pictures of emoji on plain, graded and photographic backgrounds.
It exists so that decoding methods can be run and measured anywhere; it is not a product.

| | |
|---|---|
| transformer | Qwen2 layout, {layers} layers, width {width}, {heads} query heads and {kv_heads} key/value heads, {params:.1f} M parameters, bfloat16 |
| image tokenizer | FSQ [8, 5, 5, 5], 1,000 codes, 64x64 pixels to 16x16 tokens; MSE {mse:.4f} on fresh composites (pixels in [-1, 1], grain included) |
| text | byte-level BPE, 3,072 entries, at most 20 tokens a prompt; 10 % of the captions dropped for guidance |
| training | 3,000 steps of 24 pictures in which all concepts were alike, then {steps} in which three of four pictures show one of 185 everyday things; Muon and AdamW, bfloat16 with float32 masters, seed 0, two CPU cores; `examples/emoji` |
| draft head | of the method `eagle`: one layer, 0.92 M parameters, 1,000 steps of 8 pictures (`train_eagle.py`) |
| data | Noto (Apache-2.0), Twemoji (CC-BY 4.0), Fluent flat (MIT) emoji on scikit-image's public-domain photographs; see NOTICE |

## Held-out likelihood

Nats an image token, no guidance, 512 pictures each:

| pictures | nats | |
|---|---|---|
| of the training set | {in_sample:.3f} | |
| new, of concepts it was trained on | {fresh:.3f} | {fresh_gap:+.3f}: no picture is memorised |
| new, of concepts never shown (4 % of all, "purple heart" and "green square" among them) | {held_out:.3f} | {gap:+.3f}: what a thing looks like has to be shown |

## Calibration for Jacobi decoding

Mean total variation of the next-token law when the token at distance j is replaced by another likely one
({calibrated} held-out pictures; distance 16 is the token above). The published row is Lumina-mGPT's.

| distance | {distances} |
|---|{rule}|
| this model | {curve} |
| Lumina-mGPT | 0.32 | 0.06 | 0.042 | 0.034 | |

## Samples

One sample for each prompt, not chosen: seed {seed}, guidance {guidance}, temperature {temperature}, top-k {top_k}, method `maximal`.

![samples](samples.png)

Combinations that training never showed:

![unseen](unseen.png)

Everyday things and all backgrounds are recognisable; rare emoji are often shapes in the right colours. Training was stopped
by time: a longer run would sharpen them.

Written by `python examples/emoji/model_card.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--model", type=Path, default=Path("sjd_engine/assets/emoji"))
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    engine = Engine(args.model, device="cpu")
    model = engine.model
    train, fresh, held_out = (CaptionedCodes(args.cache, split) for split in ("train", "fresh", "held_out"))
    in_sample, new, unseen = (nats_per_token(model, data, args.pictures) for data in (train, fresh, held_out))
    curve = calibration(model, held_out, args.calibration)
    sample_grid(engine, SEEN, args.model / "samples.png", columns=8, seed=args.seed)
    sample_grid(engine, [p for p in UNSEEN for _ in range(2)], args.model / "unseen.png", columns=8, seed=args.seed)
    block, params = model.transformer.config, model.defaults.params
    facts = {
        "layers": block.num_layers,
        "width": block.hidden_size,
        "heads": block.num_heads,
        "kv_heads": block.num_kv_heads,
        "params": sum(p.numel() for name, p in model.transformer.named_parameters() if name != "head") / 1e6,
        "mse": reconstruction_mse(model, args.model, held_out),
        "steps": torch.load(args.cache / "transformer.pt", weights_only=True)["step"],
        "count": args.pictures,
        "in_sample": in_sample,
        "fresh": new,
        "fresh_gap": new - in_sample,
        "held_out": unseen,
        "gap": unseen - in_sample,
        "calibrated": args.calibration,
        "distances": " | ".join(map(str, DISTANCES)),
        "rule": "|".join("---" for _ in DISTANCES),
        "curve": " | ".join(f"{value:.3f}" for value in curve.values()),
        "seed": args.seed,
        "guidance": SHEET_GUIDANCE,
        "temperature": params.temperature,
        "top_k": params.top_k,
    }
    (args.model / "README.md").write_text(CARD.format(**facts))
    print(json.dumps({**facts, "curve": curve}))


if __name__ == "__main__":
    main()
