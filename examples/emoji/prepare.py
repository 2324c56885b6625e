"""Tokenise the data set: train the text tokenizer, compose pictures, encode them to codes.

python examples/emoji/prepare.py --cache .cache/emoji --pictures 80000
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from data import (
    CANVAS,
    COLORS,
    TEXTURES,
    Compositor,
    Glyph,
    held_out_concept,
    held_out_pair,
    load_glyphs,
    sampling_weight,
    training_folder,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from train_tokenizer import FSQEncoder, to_tensor

from sjd_engine.models.detokenizers.fsq import FSQConfig

TEXT_VOCAB_SIZE = 3072
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|boi|>"]
MAX_PROMPT_TOKENS = 20  # with <|bos|> and <|boi|>
BACKGROUNDS = [*COLORS, *(f"{color} gradient" for color in COLORS), *TEXTURES]


def train_text_tokenizer(compositor: Compositor, weights: np.ndarray, seed: int) -> Tokenizer:
    """Byte-level BPE on 200,000 captions: most words of the data are one token, and any text works."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(weights), 200_000, p=weights / weights.sum())
    captions = [compositor.caption(i, BACKGROUNDS[rng.integers(len(BACKGROUNDS))], rng) for i in chosen]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=TEXT_VOCAB_SIZE,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|boi|>", special_tokens=[("<|bos|>", 1), ("<|boi|>", 2)]
    )
    return tokenizer


def encode_pictures(
    encoder: FSQEncoder,
    compositor: Compositor,
    weights: np.ndarray,
    count: int,
    seed: int,
    keep_pairs: bool,
    label: str,
) -> dict[str, np.ndarray]:
    """`count` composites as codes [count, tokens] int16, with the glyph and the background of each.

    `keep_pairs`: False drops the held-out pairs, as training must.
    """
    rng = np.random.default_rng((seed, 1))
    probabilities = weights / weights.sum()
    rows: dict[str, list] = {"codes": [], "glyph": [], "background": []}
    with tqdm(total=count, desc=label) as bar:
        while len(rows["glyph"]) < count:
            pictures = []
            while len(pictures) < min(256, count - len(rows["glyph"])):
                index = int(rng.choice(len(weights), p=probabilities))
                words, picture = compositor.compose(index, rng)
                if not keep_pairs and held_out_pair(compositor.glyphs[index], words):
                    continue
                pictures.append((index, BACKGROUNDS.index(words), picture))
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                codes = encoder(to_tensor([p for _, _, p in pictures]))[1]
            rows["codes"].append(codes.flatten(1).numpy().astype(np.int16))
            rows["glyph"] += [g for g, _, _ in pictures]
            rows["background"] += [b for _, b, _ in pictures]
            bar.update(len(pictures))
    return {
        "codes": np.concatenate(rows["codes"]),
        "glyph": np.asarray(rows["glyph"], np.int32),
        "background": np.asarray(rows["background"], np.int8),
    }


def load_encoder(folder: Path) -> FSQEncoder:
    """The image encoder of an exported folder, or of a training cache."""
    encoder = FSQEncoder(FSQConfig())
    if (folder / "encoder.safetensors").exists():
        state = load_file(folder / "encoder.safetensors")
    else:
        saved = torch.load(folder / "tokenizer.pt", weights_only=True)["parts"][0]
        state = {k.removeprefix("encoder."): v for k, v in saved.items() if k.startswith("encoder.")}
    encoder.load_state_dict(state)
    return encoder.eval()


def weights_of(glyphs: list[Glyph], held_out: bool) -> np.ndarray:
    return np.array([sampling_weight(g) if held_out_concept(g) == held_out else 0.0 for g in glyphs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--pictures", type=int, default=80_000)
    parser.add_argument("--held-out", type=int, default=1024)
    parser.add_argument("--canvas", type=int, default=CANVAS, help="pixels of a side: 64, 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizers-from", type=Path, help="exported folder whose tokenizers to use, not new ones")
    args = parser.parse_args()

    glyphs, rgba = load_glyphs(args.cache)
    compositor = Compositor(glyphs, rgba, args.canvas)
    folder = training_folder(args.cache, args.canvas)
    folder.mkdir(exist_ok=True)
    encoder = load_encoder(args.tokenizers_from or args.cache)
    seen, unseen = weights_of(glyphs, held_out=False), weights_of(glyphs, held_out=True)
    if args.tokenizers_from:
        shutil.copyfile(args.tokenizers_from / "tokenizer.json", folder / "text_tokenizer.json")
    else:
        train_text_tokenizer(compositor, seen, args.seed).save(str(folder / "text_tokenizer.json"))
    for name, weights, count, keep_pairs, seed in (
        ("held_out", unseen, args.held_out, True, args.seed),  # concepts that training never shows
        ("fresh", seen, args.held_out, False, args.seed + 1),  # pictures that it never shows, of concepts that it does
        ("train", seen, args.pictures, False, args.seed),
    ):
        rows = encode_pictures(encoder, compositor, weights, count, seed, keep_pairs, name)
        np.savez(folder / f"{name}.npz", **rows)


if __name__ == "__main__":
    main()
