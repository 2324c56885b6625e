"""Shared fixtures. The bundled model is loaded once for each dtype."""

import os

import pytest
import torch

from sjd_engine import Engine

os.environ.setdefault("SJD_POISON", "1")  # rejected slots and new pages hold NaN: a stale read spoils an image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The bundled model in float32, where equality token for token can be asked for."""
    return Engine("emoji", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def engine_bf16() -> Engine:
    return Engine("emoji", device="cpu", dtype=torch.bfloat16)
