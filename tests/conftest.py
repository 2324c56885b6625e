"""Shared fixtures. The bundled model is loaded once for each dtype."""

import pytest
import torch

from sjd_engine import Engine


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The bundled model in float32, where equality token for token can be asked for."""
    return Engine("emoji", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def engine_bf16() -> Engine:
    return Engine("emoji", device="cpu", dtype=torch.bfloat16)
