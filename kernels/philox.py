"""Counter-based random numbers: the only randomness of the engine.

    words = Philox4x32-10(counter = (position, iteration, purpose | block << 8, 0), key = seed)

A draw depends on the image's seed, the absolute position of the token, the image's own iteration and what the draw is
for; never on the batch, the slot in it, the window or how many draws came before. So an image is the same alone and in
any batch, and no two draws share a word.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; tested against Random123's known answers.
"""

import numpy as np
import torch
from torch import Tensor

from . import arithmetic
from .arithmetic import WORD

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# Purposes: the low byte of the counter's third word.
WINDOW = 0  # one block of four words for each (position, iteration): accept, fresh, residual, init
GUMBEL = 1  # the fixed noise of a position (iteration 0), one block for four vocabulary entries
TRY_SIBLINGS = 2  # one block: a word for the acceptance of each sibling of a tree, see tree.py
DRAW_SIBLINGS = 3  # one block: a word for the draw of each sibling
NOISE = 4  # the noise that a position begins with (iteration 0), one block for four numbers; see noise.py

ACCEPT, FRESH, RESIDUAL, INIT = range(4)  # the words of a WINDOW block


def philox(counter: np.ndarray | Tensor, key: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Ten rounds of Philox4x32 on int64 arrays that hold 32-bit words.

    Args:
        counter: [4, ...] int64 NumPy array or tensor, each element in 0..2^32-1.
        key: [2, ...] of the same kind, broadcastable against counter[0:2].
    Returns: [4, ...] of the same kind: four 32-bit words for each counter.
    """
    numpy = isinstance(counter, np.ndarray)
    shape = (2,) + (1,) * (counter.ndim - 1)
    multipliers, steps = np.array(MULTIPLIERS).reshape(shape), np.array(KEY_STEPS).reshape(shape)
    if not numpy:
        multipliers, steps = (torch.from_numpy(x).to(counter.device) for x in (multipliers, steps))
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        product = even * multipliers  # wraps in int64; the low 64 bits are right, and all that is read
        high, low = (product >> 32) & WORD, product & WORD
        if numpy:
            even, odd = high[::-1] ^ odd ^ key, low[::-1]
        else:
            even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
        key = (key + steps) & WORD
    words = (even[0], odd[0], even[1], odd[1])
    return np.stack(words) if numpy else torch.stack(words)


def draw_words(seeds: Tensor, positions: Tensor, iterations: Tensor, purpose: int, num_blocks: int = 1) -> Tensor:
    """The random words of every (sequence, position): on a CPU through NumPy, whose small-array calls are cheaper.

    Args:
        seeds: [B] int64. The image's seed, any 64-bit value.
        positions: [B, N] int64 in 0..2^32-1.
        iterations: [B] int64.
        purpose: one of those above.
        num_blocks: Philox blocks for each position, numbered from 0.
    Returns: [4, B, N, num_blocks] int64, words in 0..2^32-1.
    """
    third = purpose + (torch.arange(num_blocks, device=seeds.device) << 8)
    zero = torch.zeros_like(third)
    counter = torch.stack(
        torch.broadcast_tensors(positions[..., None] & WORD, iterations[:, None, None] & WORD, third, zero)
    )
    key = torch.stack((seeds & WORD, (seeds >> 32) & WORD))[..., None, None]
    if seeds.device.type == "cpu":
        return torch.from_numpy(philox(counter.numpy(), key.numpy()))
    return philox(counter, key)


def uniform(words: Tensor) -> Tensor:
    """Words to float64 in the open interval (0, 1): (word + 1/2) / 2^32."""
    return (words.double() + 0.5) * 2.0**-32


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise of each (seed, position, token), the same in every iteration.

    Args:
        seeds: [B] int64.
        positions: [B, N] int64.
        vocab_size: V.
    Returns: [B, N, V] float32. Token v reads word v % 4 of block v // 4.
    """
    blocks = -(-vocab_size // 4)
    words = draw_words(seeds, positions, torch.zeros_like(seeds), GUMBEL, blocks)
    return arithmetic.gumbel(words.permute(1, 2, 3, 0).flatten(2)[..., :vocab_size])
