"""The ops of one decoding pass. `reference` is the definition of correct; fused kernels equal it.

verify(...)                       one launch on a GPU (Triton, imported when it is first asked for)
reference.verify(...)             the same in plain PyTorch
attention.window_attention(...)   one launch or two on a GPU, over a paged cache (Triton)
paged.window_attention(...)       the same in plain PyTorch, with the other ops of that cache
"""

from typing import Any

from . import arithmetic, paged, philox, reference, state

__version__ = "0.1.0"  # a package called "kernels" is probed for its version by other libraries

__all__ = ["arithmetic", "paged", "philox", "reference", "state", "verify"]


def __getattr__(name: str) -> Any:
    if name != "verify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .verify import verify

    globals()["verify"] = verify  # in place of the module of that name
    return verify
