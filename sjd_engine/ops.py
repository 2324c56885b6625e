"""The ops the decoder calls, and the name of what runs them. The only importer of `sjd_engine.kernels`."""

from sjd_engine.kernels import philox
from sjd_engine.kernels.reference import start, verify, warp
from sjd_engine.kernels.state import Grid, VerifyResult, WindowState

__all__ = ["Grid", "VerifyResult", "WindowState", "backend", "philox", "start", "verify", "warp"]


def backend() -> str:
    """The implementation behind `verify`."""
    return "reference (PyTorch)"
