"""The ops of one decoding pass. `reference` is the definition of correct; fused kernels equal it."""

from . import arithmetic, philox, reference, state

__version__ = "0.1.0"  # a package called "kernels" is probed for its version by other libraries

__all__ = ["arithmetic", "philox", "reference", "state"]
