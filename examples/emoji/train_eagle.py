"""Train EAGLE's draft head for an exported model: next hidden state and next law, from the last of both.

The hidden states are the model's own on the pictures of the training set. A share of them is replaced by the head's
guesses, since in a chain of drafts it reads its guesses. Loss: cross-entropy to the model's law, and smooth L1 of the
normalised hidden states.

    python examples/emoji/train_eagle.py --cache .cache/emoji --model sjd_engine/assets/emoji
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import CANVAS, training_folder
from safetensors.torch import save_file
from torch import Tensor
from train_transformer import CaptionedCodes

from sjd_engine.models import load_model
from sjd_engine.models.block import Pass, Transformer
from sjd_engine.models.draft_head import FILE, DraftHead
from sjd_engine.ops import layer_ops
from sjd_engine.train.checkpoints import load_checkpoint, save_checkpoint
from sjd_engine.train.whole_sequence import WholeSequence, image_logits

NULL_CAPTION_RATE = 0.3  # guidance reads the law without a caption as often as the one with
GUESSED = 0.3  # share of the hidden states that the head has guessed


def new_head(transformer: Transformer) -> DraftHead:
    """It begins as the transformer's last layer, on the last hidden state alone."""
    head = DraftHead(transformer.config)
    head.block.load_state_dict(transformer.blocks[-1].state_dict())
    head.norm.data.fill_(1)
    head.w_in.data.copy_(torch.cat((torch.zeros(len(head.w_in), len(head.w_in)), torch.eye(len(head.w_in))), 1))
    return head.float().requires_grad_()


@torch.inference_mode()
def hidden_states(transformer: Transformer, ids: Tensor, first: Tensor, count: int) -> Tensor:
    """[B, count, hidden] of the slots that predict the image tokens, before the final norm."""
    hidden = transformer(transformer.embed(ids), transformer.new_cache(*ids.shape))
    slots = first[:, None] + torch.arange(count)
    return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1])).float()


def guess(head: DraftHead, transformer: Transformer, codes: Tensor, hidden: Tensor, first_code: int) -> Tensor:
    """[B, T - 1, hidden]: what the head guesses for slots 1..T - 1."""
    count = codes.shape[1] - 1
    cos, sin = (table[:count, None].float() for table in (transformer.cos, transformer.sin))
    run = Pass(WholeSequence(), count, cos, sin, None, layer_ops(hidden))
    return head(transformer.embed(codes[:, :-1] + first_code).float(), hidden[:, :-1], run)


def guess_in_chains(
    head: DraftHead, transformer: Transformer, codes: Tensor, hidden: Tensor, first_code: int, share: float
) -> Tensor:
    """`guess` from hidden states of which a share are guesses themselves."""
    with torch.no_grad():
        guessed = torch.cat((hidden[:, :1], guess(head, transformer, codes, hidden, first_code)), 1)
    read = torch.where(torch.rand(hidden.shape[:2])[..., None] < share, guessed, hidden)
    return guess(head, transformer, codes, read, first_code)


def normalised(transformer: Transformer, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], eps=transformer.config.norm_eps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--canvas", type=int, default=CANVAS, help="pixels of a side, as given to prepare.py")
    parser.add_argument("--model", type=Path, default=Path("sjd_engine/assets/emoji"), help="exported folder")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train, held_out = (CaptionedCodes(args.cache, split, args.canvas) for split in ("train", "fresh"))
    model = load_model(args.model, torch.device("cpu"), torch.bfloat16)
    transformer, first_code = model.transformer, model.first_code
    head = new_head(transformer)
    matrices = [p for p in head.parameters() if p.ndim == 2]
    vectors = [p for p in head.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=args.lr, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    path = training_folder(args.cache, args.canvas) / "eagle.pt"
    start = load_checkpoint(path, head, muon, adamw)

    def losses(data: CaptionedCodes, rows: np.ndarray, step: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """(cross-entropy, smooth L1, chance that a draft is accepted) of some pictures."""
        rng = np.random.default_rng((args.seed, step))
        ids, first, codes = data.batch(rows, rng, NULL_CAPTION_RATE)
        hidden = hidden_states(transformer, ids, first, codes.shape[1]).clone()
        target = image_logits(transformer, hidden[:, 1:]).softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            guessed = guess_in_chains(head, transformer, codes, hidden, first_code, share).float()
        law = image_logits(transformer, guessed).log_softmax(-1)
        features = F.smooth_l1_loss(normalised(transformer, guessed), normalised(transformer, hidden[:, 1:]))
        return -(target * law).sum(-1).mean(), features, torch.minimum(target, law.detach().exp()).sum(-1).mean()

    clock = time.perf_counter()
    for step in range(start, args.steps):
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = args.lr * min(1.0, (step + 1) / 20, (args.steps - step) / (0.5 * args.steps))
        rows = np.random.default_rng((args.seed, step)).choice(len(train), args.batch_size, replace=False)
        cross_entropy, features, accepted = losses(train, rows, step, GUESSED)
        (cross_entropy + features).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            print(
                f"step {step + 1:4d}  nats {cross_entropy.item():.4f}  features {features.item():.4f}  "
                f"accepted {accepted.item():.3f}  {(time.perf_counter() - clock) / (step + 1 - start):.2f} s/step",
                flush=True,
            )
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            save_checkpoint(path, step + 1, head, muon, adamw)
    with torch.no_grad():
        for share in (0.0, 1.0):
            accepted = losses(held_out, np.arange(32), args.steps, share)[2]
            print(f"new pictures, {share:.0%} of the hidden states guessed: {accepted:.3f} of the drafts accepted")
    save_file({name: p.detach().bfloat16().contiguous() for name, p in head.named_parameters()}, args.model / FILE)


if __name__ == "__main__":
    main()
