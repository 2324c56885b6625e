"""Train the image tokenizer: an FSQ autoencoder, 64x64 pixels -> 16x16 codes of 1,000.

python examples/emoji/train_tokenizer.py --cache .cache/emoji --steps 2300
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import Compositor, held_out_concept, load_glyphs, sampling_weight
from torch import Tensor, nn

from sjd_engine.models.detokenizers.fsq import FSQConfig, FSQDecoder, ResBlock
from sjd_engine.train.checkpoints import load_checkpoint, save_checkpoint


class FSQEncoder(nn.Module):
    """Pixels to FSQ values and codes; only training needs it."""

    def __init__(self, config: FSQConfig):
        super().__init__()
        self.config = config
        channels = config.channels
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResBlock(channels) for _ in range(config.num_res_blocks)))
        self.conv_out = nn.Conv2d(channels, len(config.levels), 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> (values [B, L, rows, cols], codes [B, rows, cols] int64)."""
        h = self.conv_in(F.pixel_unshuffle(images, self.config.patch_size))
        z = self.conv_out(self.blocks(h)).float()
        sizes = torch.tensor(self.config.levels, device=z.device)
        half = (sizes // 2).view(-1, 1, 1)
        # An even level count has no middle: shift the bound so that rounding reaches every level.
        reach = ((sizes - 1) * 1.001 / 2).view(-1, 1, 1)
        offset = torch.where(sizes % 2 == 0, 0.5, 0.0).view(-1, 1, 1)
        bounded = torch.tanh(z + torch.atanh(offset / reach)) * reach - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        digits = (rounded.detach() + half).long()
        basis = torch.cumprod(torch.cat([sizes.new_ones(1), sizes[:-1]]), 0).view(-1, 1, 1)
        return rounded / half, (digits * basis).sum(1)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + 0.5 x L1 of the image gradients: edges count more than grain."""

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.diff(dim=-1), x.diff(dim=-2)

    gradient = sum(F.l1_loss(a, b) for a, b in zip(slopes(output), slopes(target), strict=True))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * gradient


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    glyphs, rgba = load_glyphs(args.cache)
    compositor = Compositor(glyphs, rgba)
    weights = np.array([0.0 if held_out_concept(g) else max(sampling_weight(g), 0.1) for g in glyphs])
    weights /= weights.sum()

    config = FSQConfig()
    model = nn.ModuleDict({"encoder": FSQEncoder(config), "decoder": FSQDecoder(config)})
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.04)
    path = args.cache / "tokenizer.pt"
    start = load_checkpoint(path, model, optimizer, schedule)

    used = torch.zeros(config.codebook_size)
    clock = time.perf_counter()
    for step in range(start, args.steps):
        rng = np.random.default_rng((args.seed, step))
        chosen = rng.choice(len(glyphs), args.batch_size, p=weights)
        images = to_tensor([compositor.compose(i, rng)[1] for i in chosen]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            values, codes = model["encoder"](images)
            output = model["decoder"].decode_values(values)
        loss = reconstruction_loss(output.float(), images)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        used = used * 0.98 + torch.bincount(codes.flatten(), minlength=config.codebook_size)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            mse = F.mse_loss(output.float(), images).item()
            print(
                f"step {step + 1:5d}  loss {loss.item():.4f}  mse {mse:.4f}  codes {int((used > 0.5).sum())}  "
                f"{time.perf_counter() - clock:.0f} s",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save_checkpoint(path, step + 1, model, optimizer, schedule)


if __name__ == "__main__":
    main()
