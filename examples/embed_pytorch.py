"""JacobiDecoder in a plain PyTorch loop: the model and its cache stay whose they are.

    python examples/embed_pytorch.py

The cache here has a slot for every position. A rejected token needs no undoing then: its slot is overwritten before
anything can look at it. A cache that appends would be cut to `result.num_committed` slots behind the prompt instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine import JacobiDecoder, SamplingParams, Schedule

ROWS, COLS, CODES = 8, 8, 64


class TheirModel(nn.Module):
    """Somebody's transformer: text tokens, image tokens behind them, learnt positions, a cache of its own."""

    def __init__(self, hidden: int = 64, heads: int = 4, layers: int = 2, context: int = 128):
        super().__init__()
        self.heads, self.context = heads, context
        self.tokens, self.places = nn.Embedding(2 * CODES, hidden), nn.Embedding(context, hidden)
        self.qkv = nn.ModuleList(nn.Linear(hidden, 3 * hidden) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(hidden, hidden), nn.GELU()) for _ in range(layers))
        self.head = nn.Linear(hidden, CODES)

    def new_cache(self, batch_size: int) -> list[Tensor]:
        hidden = self.tokens.embedding_dim
        return [torch.zeros(2, batch_size, self.context, hidden) for _ in self.qkv]

    def forward(self, ids: Tensor, places: Tensor, cache: list[Tensor]) -> Tensor:
        """ids, places: [B, N] -> logits [B, N, CODES]; keys and values are written where `places` says."""
        x = self.tokens(ids) + self.places(places)
        seen = torch.arange(self.context) <= places[:, None, :, None]
        for qkv, mlp, stored in zip(self.qkv, self.mlp, cache, strict=True):
            queries, *new = qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
            for kept, tensor in zip(stored, new, strict=True):
                kept.scatter_(1, places[..., None].expand_as(tensor), tensor)
            parts = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, *stored))
            x = x + F.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(1, 2).flatten(2)
            x = x + mlp(x)
        return 4 * self.head(x)


@torch.no_grad()
def draw(model: TheirModel, prompts: Tensor, unconditional: Tensor, **arguments) -> tuple[Tensor, list[int]]:
    """Image codes [B, ROWS * COLS] of prompts [B, P], and the passes that each image took."""
    decoder = JacobiDecoder(
        batch_size=len(prompts),
        num_tokens=ROWS * COLS,
        vocab_size=CODES,
        schedule=Schedule(ROWS, COLS),
        init="above-sample",
        params=SamplingParams(guidance_scale=2.0, top_k=32),
        **arguments,
    )
    text = torch.cat((prompts, unconditional))  # the unconditional half is the second
    num_text, cache = text.shape[1], model.new_cache(len(text))
    places = torch.arange(num_text).expand(len(text), -1)
    model(text[:, :-1], places[:, :-1], cache)  # the last text token is the first window's anchor
    while not decoder.done:
        ids, positions = (t.repeat(2, 1) for t in decoder.window())
        ids = torch.where(ids < 0, text[:, -1:], ids + CODES)  # -1: the end of the prompt
        logits = model(ids, positions + num_text, cache)
        decoder.verify(logits.unflatten(0, (2, -1)))
    return decoder.token_ids, decoder.stats.iterations


def main() -> None:
    torch.manual_seed(0)
    model = TheirModel().eval()
    prompts, unconditional = torch.randint(CODES, (2, 5)), torch.zeros(2, 5, dtype=torch.int64)
    one, _ = draw(model, prompts, unconditional, seeds=[1, 2], method="ar", window_size=1)
    for method in ("exact", "maximal"):
        codes, passes = draw(model, prompts, unconditional, seeds=[1, 2], method=method, window_size=16)
        equal = "the images of" if torch.equal(codes, one) else "other images than"
        print(f"{method}: {ROWS * COLS} tokens in {passes} passes, {equal} one token a pass")


if __name__ == "__main__":
    main()
