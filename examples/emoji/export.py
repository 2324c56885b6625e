"""Write the trained parts as a checkpoint folder: bfloat16 safetensors, configs and the text tokenizer.

python examples/emoji/export.py --cache .cache/emoji --out sjd_engine/assets/emoji
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from data import CANVAS, training_folder
from prepare import MAX_PROMPT_TOKENS, TEXT_VOCAB_SIZE
from safetensors.torch import save_file
from train_transformer import MasterWeights, model_config
from transformers import Qwen2Model

from sjd_engine.models.detokenizers.fsq import FSQConfig


def export_image_tokenizer(cache: Path, out: Path) -> None:
    tokenizer = torch.load(cache / "tokenizer.pt", weights_only=True)["parts"][0]
    decoder = {n.removeprefix("decoder."): t.bfloat16() for n, t in tokenizer.items() if n.startswith("decoder.")}
    save_file({n: t.contiguous() for n, t in decoder.items()}, out / "detokenizer.safetensors")
    encoder = {n.removeprefix("encoder."): t.contiguous() for n, t in tokenizer.items() if n.startswith("encoder.")}
    save_file(encoder, out / "encoder.safetensors")  # float32: training further needs the very same codes
    (out / "detokenizer_config.json").write_text(json.dumps(asdict(FSQConfig()), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--out", type=Path, default=Path("sjd_engine/assets/emoji"))
    parser.add_argument("--canvas", type=int, default=CANVAS, help="pixels of a side, as given to prepare.py")
    parser.add_argument("--tokenizers-from", type=Path, help="exported folder whose tokenizers were used")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    folder, side = training_folder(args.cache, args.canvas), args.canvas // FSQConfig().patch_size
    config = model_config(side * side)
    model = Qwen2Model(config)
    master = MasterWeights(model)
    trained = torch.load(folder / "transformer.pt", weights_only=True)
    master.load_state_dict(trained["parts"][0])
    master.give_weights()
    weights = {f"model.{name}": tensor.bfloat16().contiguous() for name, tensor in model.named_parameters()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})

    if args.tokenizers_from:
        for name in ("detokenizer.safetensors", "encoder.safetensors", "detokenizer_config.json"):
            shutil.copyfile(args.tokenizers_from / name, args.out / name)
    else:
        export_image_tokenizer(args.cache, args.out)
    shutil.copyfile(folder / "text_tokenizer.json", args.out / "tokenizer.json")

    plan = {
        "family": "emoji",
        "first_code": TEXT_VOCAB_SIZE,
        "grid": [side, side],
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "defaults": {"window_size": 32, "guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    }
    fields = {
        **config.to_dict(),
        "name": "emoji" if args.canvas == CANVAS else f"emoji-{args.canvas}",
        "architectures": ["Qwen2ForCausalLM"],
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "use_cache": True,
        "image_generation": plan,
    }
    (args.out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB of weights, step {trained['step']}")


if __name__ == "__main__":
    main()
