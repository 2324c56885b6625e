"""Names of the Hugging Face hub, against a hub that is a folder."""

import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sjd_engine import CheckpointError
from sjd_engine.models import checkpoint_folder, hub, load_model

FILES = {
    "good/safe": ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "tokenizer/vqgan.ckpt"],
    "good/pickled": ["config.json", "pytorch_model.bin", "modeling_x.py"],
    "good/LlamaGen": ["c2i_B_256.pt", "c2i_L_256.pt", "vq_ds16_c2i.pt", "vq_ds8_c2i.pt"],
}


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Names of files that have come from the hub."""
    names: set[str] = set()

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        if repository not in FILES:
            raise FileNotFoundError(f"{repository} is not cached and the hub can't be reached")
        for name in FILES[repository]:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                path = tmp_path / repository / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
                names.add(name)
        return str(tmp_path / repository)

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return names


def test_safetensors_and_never_code(fetched, tmp_path):
    assert checkpoint_folder("good/safe") == tmp_path / "good/safe"
    assert fetched == {"config.json", "model.safetensors", "tokenizer/vqgan.ckpt"}


def test_pickles_where_there_are_no_safetensors(fetched):
    checkpoint_folder("good/pickled")
    assert fetched == {"config.json", "pytorch_model.bin"}


def test_one_file_and_its_detokenizer(fetched, tmp_path):
    assert checkpoint_folder("good/LlamaGen/c2i_B_256.pt") == tmp_path / "good/LlamaGen/c2i_B_256.pt"
    assert fetched == {"c2i_B_256.pt", "vq_ds16_c2i.pt"}


def test_a_hub_that_does_not_have_it(fetched):
    with pytest.raises(
        CheckpointError, match=r"'bad/name' is no folder here, and the hub did not give it: bad/name is"
    ):
        load_model("bad/name", torch.device("cpu"), torch.float32)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="install huggingface_hub"):
        checkpoint_folder("good/safe")


@pytest.mark.parametrize("name", ["a", "no/such/model", "a/b/c.bin", "a b/c", Path("/no/such")])
def test_what_is_no_name(name):
    assert not hub.is_id(str(name))
    with pytest.raises(CheckpointError, match="neither a bundled model"):
        checkpoint_folder(name)
