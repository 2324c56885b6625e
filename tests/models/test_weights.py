"""A checkpoint that is damaged, foreign or incomplete is refused with its reason."""

import gc
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

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


# ----------------------------------------------------------------------------------------------- other forms of weights


def split(folder, *, names=("model-1.safetensors", "model-2.safetensors"), index="model.safetensors.index.json"):
    """Write the folder's weights as two files and an index of them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    keys = sorted(tensors)
    held = {names[0]: keys[::2], names[1]: keys[1::2]}
    for name, part in held.items():
        shard = {key: tensors[key].clone() for key in part}
        save_file(shard, folder / name) if name.endswith("safetensors") else torch.save(shard, folder / name)
    write_index(folder / index, {key: name for name, part in held.items() for key in part})


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(folder, value):
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


def same_weights(folder):
    ours = Engine(folder, device="cpu", dtype=torch.float32).model.transformer
    expected = Engine("emoji", device="cpu", dtype=torch.float32).model.transformer
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))


def test_two_safetensors_files(folder):
    split(folder)
    assert same_weights(folder)


def test_two_pickles(folder):
    split(folder, names=("pytorch_model-1.bin", "pytorch_model-2.bin"), index="pytorch_model.bin.index.json")
    assert same_weights(folder)


def test_a_pickle_of_a_training_script(folder):
    pickled(folder, {"state_dict": load_file(folder / "model.safetensors"), "args": Namespace(lr=0.1), "step": 3})
    assert same_weights(folder)


def test_a_truncated_shard(folder):
    split(folder)
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(folder, r"model-2\.safetensors: not a whole safetensors file")


def test_a_truncated_pickle(folder):
    pickled(folder, load_file(folder / "model.safetensors"))
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(folder, r"pytorch_model\.bin: not a whole file of torch\.save")


def test_a_missing_shard(folder):
    split(folder)
    (folder / "model-1.safetensors").unlink()
    refuse(folder, r"no model-1\.safetensors")


def test_a_shard_without_a_tensor_of_the_index(folder):
    split(folder)
    tensors = load_file(folder / "model-1.safetensors")
    name = min(tensors)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model-1.safetensors")
    refuse(folder, rf"index\.json: missing {re.escape(name)} in model-1\.safetensors")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_leads_out_of_the_folder(folder, name):
    save_file(load_file(folder / "model.safetensors"), folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    write_index(folder / "model.safetensors.index.json", {"model.norm.weight": name})
    refuse(folder, "expected names of files beside it, got")


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}])
def test_an_index_that_is_none(folder, weight_map):
    write_index(folder / "model.safetensors.index.json", weight_map)
    refuse(folder, 'expected "weight_map", a file name for each tensor')


class Payload:
    """Runs a command when it is unpickled by someone careless."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["a value", "beside the weights", "not by torch.save"])
def test_code_in_a_pickle_does_not_run(folder, tmp_path, place):
    marker, tensors = tmp_path / "ran", load_file(folder / "model.safetensors")
    if place == "a value":
        pickled(folder, {**tensors, "model.norm.weight": Payload(marker)})
    elif place == "beside the weights":
        pickled(folder, {"model": tensors, "optimizer": Payload(marker)})
    else:
        pickled(folder, {})
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({**tensors, "x": Payload(marker)}))
    expected = "not a whole file of torch.save" if place == "not by torch.save" else "holds more than tensors"
    refuse(folder, expected)
    assert not marker.exists()
    if place != "not by torch.save":  # the payload is real: a careless reader runs it
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("value", [[1, 2], {"model.norm.weight": "text"}, torch.zeros(3)])
def test_a_pickle_of_something_else(folder, value):
    pickled(folder, value)
    refuse(folder, "expected a dict of tensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_dtype(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    refuse(folder, r"model\.layers\.3\.mlp\.up_proj\.weight: expected float32, float16 or bfloat16, got torch\.")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads mapped files from /proc")
def test_a_load_that_fails_halfway_keeps_no_memory(folder):
    def large_tensors() -> int:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        return sum(tensor.numel() > 10_000 for tensor in tensors)

    before = large_tensors()
    tensors = load_file(folder / "model.safetensors")
    last = "model.layers.7.mlp.down_proj.weight"
    save_file({**tensors, last: tensors[last].to(torch.int8)}, folder / "model.safetensors")
    del tensors
    refuse(folder, rf"{re.escape(last)}: expected float32")
    assert large_tensors() == before
    assert str(folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"hidden_size": 1 << 40}, "expected hidden_size in 1"),
        ({"num_hidden_layers": 1 << 20}, r"layers, but there are \d+ tensors"),
        ({"num_hidden_layers": 7}, r"unknown model\.layers\.7"),
        ({"num_hidden_layers": 9}, r"missing model\.layers\.8"),
        ({"max_position_embeddings": 1 << 40}, "expected max_positions in 1"),
        ({"num_attention_heads": 7}, "whole groups of heads"),
        ({"num_key_value_heads": 1}, r"wqkv: expected \["),
        ({"intermediate_size": -4}, "expected intermediate_size in 1"),
        ({"hidden_size": "64"}, r"expected hidden_size in 1\.\.\d+ in config\.json, got '64'"),
        ({"vocab_size": 10}, r"embedding: expected \[10, "),
        ({"hidden_act": "gelu"}, "expected hidden_act silu"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "linearly scaled RoPE"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_factor must be > 0"),
    ],
    ids=str,
)
def test_a_config_that_lies(folder, lie, message):
    config = json.loads((folder / "config.json").read_text())
    config |= lie
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, message)


# --------------------------------------------------------------------------------------------------------------- memory

LOAD = """
import re, sys, time
from pathlib import Path
import torch
from sjd_engine.models.checkpoint import Checkpoint
from sjd_engine.models.weights import load_qwen2

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)
checkpoint, device = Checkpoint(Path(sys.argv[1])), torch.device("cpu")
before = status("VmRSS")
model = load_qwen2(checkpoint, first_code=0, num_codes=64, device=device, dtype=torch.bfloat16)
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, form):
    """One gigabyte of weights; a copy beside the model, or a file that stays mapped, would take twice that."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = {**sizes, "num_hidden_layers": 10, "vocab_size": 64, "max_position_embeddings": 64}
    config |= {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    square, wide = torch.zeros(2048, 2048, dtype=torch.bfloat16), torch.zeros(5632, 2048, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": square[:64], "model.norm.weight": square[0]}
    for i in range(10):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.self_attn.{x}_proj.weight": square for x in "qkvo"}
        tensors |= {f"{layer}.self_attn.{x}_proj.bias": square[0] for x in "qkv"}
        tensors |= {f"{layer}.mlp.{x}_proj.weight": wide for x in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = wide.view(2048, 5632)
        tensors |= {f"{layer}.{x}_layernorm.weight": square[0] for x in ("input", "post_attention")}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if form == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    del tensors
    out = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, check=True).stdout
    taken, size = map(int, out.split())
    (tmp_path / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")).unlink()
    assert size > 1e9
    assert taken <= 1.15 * size, f"{taken / size:.2f} times the weights"
