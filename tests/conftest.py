"""Shared fixtures. The bundled model is loaded once for each dtype."""

import os
from dataclasses import replace

import pytest
import torch

from sjd_engine import Engine
from sjd_engine.models import checkpoint_folder, load_model

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


def first_layer(dtype: torch.dtype) -> Engine:
    """The bundled model cut to its first layer: the same tokens, images and calls in a fifth of the time, for what does
    not depend on the weights."""
    model = load_model(checkpoint_folder("emoji"), torch.device("cpu"), dtype)
    model.transformer.blocks = model.transformer.blocks[:1]
    model.transformer.config = replace(model.transformer.config, num_layers=1)
    return Engine(model)


@pytest.fixture(scope="session")
def shallow() -> Engine:
    return first_layer(torch.float32)


@pytest.fixture(scope="session")
def shallow_bf16() -> Engine:
    return first_layer(torch.bfloat16)
