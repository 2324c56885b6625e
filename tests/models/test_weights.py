"""A checkpoint that is damaged, foreign or incomplete is refused with its reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sjd_engine import CheckpointError, Engine
from sjd_engine.models import checkpoint_folder


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled checkpoint to damage."""
    return shutil.copytree(checkpoint_folder("emoji"), tmp_path / "checkpoint")


def refuse(folder, message):
    with pytest.raises(CheckpointError, match=message):
        Engine(folder, device="cpu")


def test_a_copy_loads(folder):
    assert Engine(folder, device="cpu").model.num_codes == 1000


@pytest.mark.parametrize("name", ["model.safetensors", "detokenizer.safetensors"])
@pytest.mark.parametrize("size", [0, 5, 5000], ids=["empty", "header", "body"])
def test_truncated_weights(folder, name, size):
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])
    refuse(folder, f"{name}: not a whole safetensors file")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "detokenizer.safetensors", "detokenizer_config.json"]
)
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refuse(folder, f"no {name}")


def test_a_missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refuse(folder, "no tokenizer.json")


def test_foreign_weights(folder):
    save_file({"transformer.h.0.attn.weight": torch.zeros(3)}, folder / "model.safetensors")
    refuse(folder, "8 layers, but there are 1 tensors")


def test_an_unknown_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(3)}, folder / "model.safetensors")
    refuse(folder, r"unknown model\.extra")


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 64
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, r"w_gate_up: expected \[")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    refuse(folder, r"config\.json")


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "max_position_embeddings"])
def test_a_config_without_a_key(folder, key):
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, key)


def test_an_unknown_family(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refuse(folder, "no known model family; known: emoji, anole")


def test_neither_name_nor_folder():
    refuse("no/such/model", "neither a bundled model")
