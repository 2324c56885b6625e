"""How the fused kernels are launched: one plain table, for the launcher and for the tests that compile it offline."""

from dataclasses import dataclass


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


def constants(accept: str, refresh: str, init: str, window_size: int, vocab_size: int, cols: int) -> dict[str, object]:
    """The constexpr arguments of `verify._verify_kernel`."""
    row = choose(vocab_size)
    return {
        "ACCEPT": accept,
        "REFRESH": refresh,
        "INIT": init,
        "STEPS": (window_size - 1) // cols if init.startswith("above") else 0,
        "TILE": row.tile,
        "NUM_TILES": row.num_tiles(vocab_size),
        "WINDOW_BLOCK": 1 << (window_size - 1).bit_length(),
    }


def options(vocab_size: int, backend: str) -> dict[str, object]:
    """The compiler's options for `backend` ("cuda", "hip", or "" in the interpreter).

    No fused multiply-add: `arithmetic` rounds every operation. On NVIDIA all registers a thread can have: left to
    itself, ptxas spills to let more programs run at once, and there are too few rows for that to pay.
    """
    found: dict[str, object] = {"num_warps": choose(vocab_size).num_warps, "enable_fp_fusion": False}
    return found | {"maxnreg": 255} if backend == "cuda" else found
