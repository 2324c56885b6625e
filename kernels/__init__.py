"""The ops of one decoding pass. `reference` is the definition of correct; fused kernels equal it.

verify(...)                       one launch on a GPU (Triton, imported when it is first asked for)
reference.verify(...)             the same in plain PyTorch
denoise(...)                      the denoise update of SJD2's windows, one launch on a GPU (Triton)
noise.denoise(...)                the same in plain PyTorch
attention.window_attention(...)   one launch or two on a GPU, over a paged cache (Triton)
paged.window_attention(...)       the same in plain PyTorch, with the other ops of that cache
"""

from importlib import import_module
from typing import Any

from . import arithmetic, noise, paged, philox, reference, state

__version__ = "0.1.0"  # a package called "kernels" is probed for its version by other libraries

__all__ = ["arithmetic", "denoise", "noise", "paged", "philox", "reference", "state", "verify"]


FUSED = ("denoise", "verify")  # by Triton, which is slow to import


def __getattr__(name: str) -> Any:
    if name not in FUSED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = getattr(import_module(f".{name}", __name__), name)
    globals()[name] = op  # in place of the module of that name
    return op
