"""Train the transformer: caption tokens + image tokens, next image token, Qwen2 layout.

Weights are bfloat16 in the network and float32 in the optimizer (Muon for the matrices of the blocks, AdamW for the
rest). The learning rate warms up, stays, and falls linearly over the last `--decay` of the steps, so that a run which
has not begun to fall can be given more `--steps` and resumed.

    python examples/emoji/train_transformer.py --cache .cache/emoji --steps 3000
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import CANVAS, Compositor, load_glyphs, training_folder
from prepare import BACKGROUNDS, MAX_PROMPT_TOKENS, TEXT_VOCAB_SIZE
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from sjd_engine.train.checkpoints import load_checkpoint, save_checkpoint

NUM_CODES = 1000
NULL_CAPTION_RATE = 0.1


def model_config(num_image_tokens: int) -> Qwen2Config:
    """The transformer for a square of image tokens.

    Larger squares than 16 x 16 interpolate the positions, so that the token above is as far away as in the model that
    a training starts from: held-out loss begins at 3.7 nats instead of 4.5.
    """
    factor = num_image_tokens**0.5 / 16
    return Qwen2Config(
        vocab_size=TEXT_VOCAB_SIZE + NUM_CODES,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_PROMPT_TOKENS + num_image_tokens,
        rope_parameters={"rope_theta": 10_000.0}
        | ({"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}),
        tie_word_embeddings=True,
        use_cache=False,
    )


class CaptionedCodes:
    """Batches of (input ids, index of the token before the image, codes); captions are written anew each time."""

    def __init__(self, cache: Path, split: str, canvas: int = CANVAS):
        folder = training_folder(cache, canvas)
        rows = np.load(folder / f"{split}.npz")
        self.codes, self.glyph, self.background = rows["codes"], rows["glyph"], rows["background"]
        self.captions = Compositor(*load_glyphs(cache), canvas)
        self.tokenizer = Tokenizer.from_file(str(folder / "text_tokenizer.json"))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def num_image_tokens(self) -> int:
        return self.codes.shape[1]

    def prompt_ids(self, row: int, rng: np.random.Generator, null_rate: float) -> list[int]:
        if rng.random() < null_rate:
            return self.tokenizer.encode("").ids
        while True:
            caption = self.captions.caption(self.glyph[row], BACKGROUNDS[self.background[row]], rng)
            ids = self.tokenizer.encode(caption).ids
            if len(ids) <= MAX_PROMPT_TOKENS:
                return ids

    def batch(self, rows: np.ndarray, rng: np.random.Generator, null_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, 19 + tokens] (prompt, image tokens but the last, zeros), first [B], codes [B, tokens]."""
        count = self.num_image_tokens
        ids = np.zeros((len(rows), MAX_PROMPT_TOKENS + count - 1), np.int64)
        first = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            prompt = self.prompt_ids(row, rng, null_rate)
            first[i] = len(prompt) - 1
            ids[i, : len(prompt)] = prompt
            ids[i, len(prompt) : len(prompt) + count - 1] = self.codes[row][:-1] + TEXT_VOCAB_SIZE
        return torch.from_numpy(ids), torch.from_numpy(first), torch.from_numpy(self.codes[rows].astype(np.int64))


def nats_per_token(model: nn.Module, ids: Tensor, first: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy of the image tokens; the head is the image rows of the tied embedding."""
    hidden = model(input_ids=ids).last_hidden_state
    slots = first[:, None] + torch.arange(codes.shape[1])
    hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = F.linear(hidden, model.get_input_embeddings().weight[TEXT_VOCAB_SIZE:])
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


@torch.inference_mode()
def evaluate(model: nn.Module, data: CaptionedCodes) -> float:
    """Nats per image token on the first 131,072 of them, with captions drawn from a fixed seed."""
    rng = np.random.default_rng(1234)
    count, batch_size = (2**power // data.num_image_tokens for power in (17, 13))
    starts = range(0, count, batch_size)
    return sum(
        nats_per_token(model, *data.batch(np.arange(i, i + batch_size), rng, null_rate=0.0)).item() for i in starts
    ) / len(starts)


class MasterWeights(nn.Module):
    """float32 copies of a bfloat16 network's parameters, for the optimizer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parts = list(model.parameters())
        self.copies = nn.ParameterList(nn.Parameter(p.detach().float()) for p in self.parts)

    def take_gradients(self) -> None:
        for part, copy in zip(self.parts, self.copies, strict=True):
            copy.grad = part.grad.float()
            part.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        for part, copy in zip(self.parts, self.copies, strict=True):
            part.copy_(copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--canvas", type=int, default=CANVAS, help="pixels of a side, as given to prepare.py")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--decay", type=float, default=0.35, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, help="exported folder whose weights a new run starts from")
    parser.add_argument("--log-every", type=int, default=25, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--evaluate-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument("--stop-after", type=int, help="end after this many steps of this run (for timing)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train, held_out = (CaptionedCodes(args.cache, split, args.canvas) for split in ("train", "held_out"))
    model = Qwen2Model._from_config(model_config(train.num_image_tokens), attn_implementation="sdpa").bfloat16()
    model.rotary_emb = type(model.rotary_emb)(model.config)  # float32: positions in training are those of inference
    master = MasterWeights(model)
    matrix = [
        p for (n, _), p in zip(model.named_parameters(), master.copies, strict=True) if p.ndim == 2 and "layers" in n
    ]
    others = [
        p
        for (n, _), p in zip(model.named_parameters(), master.copies, strict=True)
        if not (p.ndim == 2 and "layers" in n)
    ]
    muon = torch.optim.Muon(matrix, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    path = training_folder(args.cache, args.canvas) / "transformer.pt"
    start = load_checkpoint(path, master, muon, adamw)
    if args.start_from and not start:
        exported = load_file(args.start_from / "model.safetensors")
        for (name, _), copy in zip(model.named_parameters(), master.copies, strict=True):
            copy.data.copy_(exported[f"model.{name}"])
    master.give_weights()
    print(f"{sum(p.numel() for p in master.copies) / 1e6:.2f} M parameters, {len(train)} pictures", flush=True)
    step_loss = torch.compile(nats_per_token, dynamic=False) if args.compile else nats_per_token

    clock, losses = time.perf_counter(), []
    for step in range(start, args.steps):
        rate = min(1.0, (step + 1) / args.warmup, (args.steps - step) / (args.decay * args.steps))
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
        rng = np.random.default_rng((args.seed, step))
        order = np.random.default_rng((args.seed, step * args.batch_size // len(train))).permutation(len(train))
        rows = order[np.arange(step * args.batch_size, (step + 1) * args.batch_size) % len(train)]
        loss = step_loss(model, *train.batch(rows, rng, NULL_CAPTION_RATE))
        loss.backward()
        master.take_gradients()
        nn.utils.clip_grad_norm_(master.parameters(), 1.0)
        muon.step()
        adamw.step()
        master.give_weights()
        losses.append(loss.item())
        if (step + 1) % args.log_every == 0:
            print(
                f"step {step + 1:5d}  nats/token {np.mean(losses[-args.log_every :]):.4f}  rate {rate:.2f}  "
                f"{(time.perf_counter() - clock) / len(losses):.3f} s/step",
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(path, step + 1, master, muon, adamw)
        if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1:5d}  in-sample {evaluate(model, train):.4f}  held-out {evaluate(model, held_out):.4f}",
                flush=True,
            )
        if args.stop_after and len(losses) == args.stop_after:
            break


if __name__ == "__main__":
    main()
