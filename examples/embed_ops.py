"""A decoding pass as one graph: paged cache, attention over its pages and verification are torch.ops.sjd.* nodes.

python examples/embed_ops.py
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sjd_engine import JacobiDecoder

CODES, NUM_TOKENS, WINDOW_SIZE, PAGE_SIZE, HEADS, HEAD_DIM = 32, 48, 8, 16, 4, 16


class Step:
    """One layer of a transformer, its paged cache and a decoder; a call is a pass."""

    def __init__(self, batch_size: int, method: str):
        hidden = HEADS * HEAD_DIM
        torch.manual_seed(0)
        self.tokens, self.places = torch.randn(CODES + 1, hidden), torch.randn(NUM_TOKENS + 2, hidden)
        self.qkv, self.head = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, CODES)
        self.decoder = JacobiDecoder(
            batch_size=batch_size,
            num_tokens=NUM_TOKENS,
            vocab_size=CODES,
            window_size=WINDOW_SIZE,
            method=method,
            seeds=range(batch_size),
        )
        self.span = NUM_TOKENS + WINDOW_SIZE
        pages = -(-self.span // PAGE_SIZE)
        self.pages = torch.zeros(batch_size * pages, 2, PAGE_SIZE, HEADS, HEAD_DIM)
        self.block_table = torch.arange(batch_size * pages, dtype=torch.int32).view(batch_size, pages)
        self.context_lens = torch.zeros(batch_size, dtype=torch.int32)

    def __call__(self) -> Tensor:
        """Tokens committed so far, [B]."""
        ids, positions = self.decoder.window()
        x = self.tokens[ids + 1] + self.places[positions + 1]  # row 0 of both stands for the prompt
        queries, keys, values = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        cache = (self.pages, self.block_table, self.context_lens)
        torch.ops.sjd.append_kv(*cache, keys, values, None, None, None)
        x = x + torch.ops.sjd.window_attention(queries, *cache, self.span, None, None).flatten(2)
        result = self.decoder.verify(4 * self.head(x))  # torch.ops.sjd.verify
        self.context_lens.copy_(result.num_committed)
        return result.num_committed


@torch.no_grad()
def draw(method: str = "maximal", backend: str | Callable | None = None) -> tuple[Tensor, int]:
    """Tokens of three sequences, and passes.

    Args:
        backend: of torch.compile, which then takes a pass as one graph; None for no compilation.
    """
    step = Step(3, method)
    run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    passes = 0
    while not step.decoder.done:
        run()
        passes += 1
    return step.decoder.token_ids, passes


def main(backend: str = "inductor") -> None:
    eager, passes = draw()
    compiled, _ = draw(backend=backend)
    print(f"{NUM_TOKENS} tokens in {passes} passes; {(eager == compiled).float().mean():.0%} the same when compiled")


if __name__ == "__main__":
    main(*sys.argv[1:])
