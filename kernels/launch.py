"""How the fused kernels are launched: plain tables, for the launchers and for the tests that compile them offline."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """One row of the table.

    max_vocab: the largest vocabulary this row serves; None for any.
    tile: logits of a row that a program holds in registers at once.
    num_warps: of a program.
    """

    name: str
    max_vocab: int | None
    tile: int
    num_warps: int

    def num_tiles(self, vocab_size: int) -> int:
        return -(-vocab_size // self.tile)


# One tile up to 4096: the row is read once and stays in registers. A tile of 8192 spills with top-p on sm_80 and
# sm_120, at 8 warps and at 16, so larger vocabularies are swept in tiles.
LAUNCHES = (
    Launch("row-1024", 1024, 1024, 4),
    Launch("row-2048", 2048, 2048, 4),
    Launch("row-4096", 4096, 4096, 8),
    Launch("tiled-4096", None, 4096, 8),
)


def choose(vocab_size: int) -> Launch:
    """The first row of the table that serves `vocab_size`."""
    return next(row for row in LAUNCHES if row.max_vocab is None or vocab_size <= row.max_vocab)


def constants(
    accept: str,
    refresh: str,
    init: str,
    max_window_size: int,
    vocab_size: int,
    cols: int,
    tree: tuple[int, int] | None,
) -> dict[str, object]:
    """The constexpr arguments of `verify._verify_kernel`: the same for every window of a decoder."""
    row = choose(vocab_size)
    candidates, depth = (1, 1) if tree is None else tree
    return {
        "CANDIDATES": candidates,
        "DEPTH": depth,
        "ACCEPT": accept,
        "REFRESH": refresh,
        "INIT": init,
        "STEPS": (max_window_size - 1) // cols if init.startswith("above") else 0,
        "TILE": row.tile,
        "NUM_TILES": row.num_tiles(vocab_size),
        "WINDOW_BLOCK": 1 << (max_window_size - 1).bit_length(),
    }


def options(vocab_size: int, backend: str) -> dict[str, object]:
    """The compiler's options for `backend` ("cuda", "hip", or "" in the interpreter).

    No fused multiply-add: `arithmetic` rounds every operation. On NVIDIA all registers a thread can have: left to
    itself, ptxas spills to let more programs run at once, and there are too few rows for that to pay.
    """
    found: dict[str, object] = {"num_warps": choose(vocab_size).num_warps, "enable_fp_fusion": False}
    return found | {"maxnreg": 255} if backend == "cuda" else found


# ------------------------------------------------------------------------------------------------------------- denoise

DENOISE_BLOCK = 1024  # 8 numbers of each of the tensors that a thread of 128 holds


def denoise_block(hidden_size: int) -> int:
    """Columns of an embedding that a program holds in registers at once."""
    return min(DENOISE_BLOCK, 1 << (hidden_size - 1).bit_length())


# ----------------------------------------------------------------------------------------------------------- attention

# Keys of a program. 4096 tokens are 16 chunks, so that two sequences of 8 kv heads are 256 programs. A multiple of the
# keys of every block.
CHUNK = 256
MAX_HEAD_DIM = 128
ATTENTION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionLaunch:
    """One row of a table. A row of attention is one query head of one window token.

    max_rows: the most rows of a kv head that this row of the table serves; None for any.
    rows, keys: of a block, which a program holds in registers at once.
    num_warps: of a program. num_stages: blocks of keys and values in shared memory at once.
    """

    name: str
    max_rows: int | None
    rows: int
    keys: int
    num_warps: int
    num_stages: int


# The widest blocks that spill nothing at head dims of 100 and 128, with a tree's bias and small pages, on any target
# that is compiled for: 64 rows by 64 keys spill on gfx942 and sm_100, 32 rows by 64 keys on sm_80 and sm_120.
HALF_LAUNCHES = (
    AttentionLaunch("rows-16", 16, 16, 64, 4, 2),
    AttentionLaunch("rows-32", 32, 32, 32, 4, 3),
    AttentionLaunch("rows-64", None, 64, 32, 8, 3),
)
# Products that round as float32 does run without tensor cores, and take many registers.
FLOAT32_LAUNCHES = (AttentionLaunch("rows-32", None, 32, 16, 8, 2),)


def attention_table(dtype: torch.dtype) -> tuple[AttentionLaunch, ...]:
    """The rows for queries, keys and values of `dtype`."""
    return FLOAT32_LAUNCHES if dtype == torch.float32 else HALF_LAUNCHES


def choose_attention(num_rows: int, dtype: torch.dtype) -> AttentionLaunch:
    """The first row of the dtype's table that serves `num_rows`."""
    return next(row for row in attention_table(dtype) if row.max_rows is None or num_rows <= row.max_rows)


def block_dim(head_dim: int) -> int:
    """The power of two that a head dim is padded to; products ask for 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def combine_rows(head_dim: int) -> int:
    """Rows of a program that puts chunks together."""
    return 256 // block_dim(head_dim)
