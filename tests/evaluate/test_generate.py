"""Runs that stop and go on, and images that depend on nothing but their line of the manifest."""

import json
from itertools import islice
from pathlib import Path

import pytest

from sjd_engine import Engine, SJDError
from sjd_engine.evaluate.generate import Artist, ThisProcess, generate
from sjd_engine.evaluate.layouts import get_layout
from sjd_engine.evaluate.manifest import read_images, read_run, sha256
from sjd_engine.recipe import read_recipe

ARTIST = Artist("emoji", {"window_size": 64}, batch_size=4)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red apple\na blue car\na tree\n")
    return path


def draw(prompts: Path, output: Path, artist: Artist = ARTIST, **arguments) -> int:
    return generate(prompts, output, get_layout("plain"), artist, progress=False, **{"seed": 7, **arguments})


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert draw(prompts, folder) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_images_are_those_of_their_seeds(whole):
    settings, _ = read_run(whole)
    images = read_images(whole)
    prompts, seeds = ([image[name] for image in images] for name in ("prompt", "seed"))
    alone = Engine("emoji").generate(prompts, seed=seeds, output_type="codes", progress=False, window_size=64)
    for image, token_ids in zip(images, alone.token_ids.tolist(), strict=True):
        assert token_ids == image["token_ids"]
        content = (whole / image["file"]).read_bytes()
        assert sha256(content) == image["sha256"]
        assert read_recipe(whole / image["file"])["seed"] == image["seed"]
    assert settings["arguments"]["window_size"] == 64
    assert settings["arguments"]["temperature"] == 1.0


def test_a_run_goes_on_with_the_images_whose_hashes_are_right(prompts, whole, tmp_path):
    class Stopping(ThisProcess):
        """Draws two images and is then stopped."""

        def draw(self, artist, shots):
            yield from islice(super().draw(artist, shots), 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(prompts, tmp_path / "run", source=Stopping())
    with pytest.raises(ValueError, match="holds 2 of 3 images"):
        read_images(tmp_path / "run")
    with pytest.raises(ValueError, match="go on with --resume"):
        draw(prompts, tmp_path / "run")
    with (tmp_path / "run" / "manifest.jsonl").open("a") as file:
        file.write('{"index": 2, "file": "images/00')  # torn off
    damaged = tmp_path / "run" / "images" / "000000.png"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert draw(prompts, tmp_path / "run", resume=True) == 1
    assert files(tmp_path / "run") == files(whole)
    assert len(read_images(tmp_path / "run")) == 3


def test_another_run_is_not_gone_on_with(prompts, whole):
    before = (whole / "manifest.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run whose arguments is"):
        draw(prompts, whole, Artist("emoji", {"window_size": 32}, batch_size=4), resume=True)
    assert (whole / "manifest.jsonl").read_bytes() == before


def test_prompts_that_fail_are_in_the_manifest_and_the_others_are_drawn(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n" + "apple " * 400 + "\n")
    with pytest.raises(SJDError, match="1 of 2 images failed"):
        draw(path, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()[1:]]
    told = {line["index"]: (line["status"], line.get("error", "")[:18]) for line in lines}
    assert told == {0: ("done", ""), 1: ("failed", "ValueError: prompt")}
    assert [path.name for path in (tmp_path / "run" / "images").iterdir()] == ["000000.png"]
