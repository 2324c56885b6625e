"""Every evaluator's way to find its images and prompts, followed on what a run leaves.

The rules below say in a line or two what the code does that `Layout.source` names.
"""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from sjd_engine import evaluate
from sjd_engine.evaluate.generate import Artist, generate
from sjd_engine.evaluate.layouts import LAYOUTS, get_layout
from sjd_engine.evaluate.manifest import DONE, read_images, sha256
from sjd_engine.images import encode_jpeg, encode_png

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]


class Blank:
    """A source of white images."""

    def settings(self, artist):
        return {"arguments": artist.arguments}

    def draw(self, artist, shots):
        for shot in shots:
            encode = encode_jpeg if shot.file.endswith(".jpg") else encode_png
            content = encode(Image.new("RGB", (8, 8), "white"), {"prompt": shot.prompt})
            yield {**vars(shot), "status": DONE, "sha256": sha256(content)}, content


@pytest.fixture
def run(tmp_path):
    """Leaves a run of a layout and its prompt file; gives the folder that the evaluator is told."""

    def leave(name: str, prompts: Path | str, **arguments) -> Path:
        if isinstance(prompts, str):
            (tmp_path / "prompts").write_text(prompts, encoding="utf-8")
            prompts = tmp_path / "prompts"
        layout = get_layout(name)
        generate(prompts, tmp_path / "run", layout, Artist("emoji", {}), source=Blank(), progress=False, **arguments)
        return tmp_path / "run" / layout.root

    return leave


def asked(folder: Path) -> dict[str, str]:
    """The prompt of every file, by the manifest."""
    return {Path(image["file"]).name: image["prompt"] for image in read_images(folder)}


def test_geneval(run):
    root = run("geneval", "".join(json.dumps(line) + "\n" for line in GENEVAL))
    found = []
    for folder in sorted(os.listdir(root)):
        if (root / folder).is_dir() and folder.isdigit():
            metadata = json.loads((root / folder / "metadata.jsonl").read_text())
            names = sorted(os.listdir(root / folder / "samples"))
            assert all(re.match(r"\d+\.png", name) for name in names)
            found.append((metadata, len(names)))
    assert found == [(line, 4) for line in GENEVAL]


def test_t2i_compbench(run):
    root = run("t2i-compbench", "a green bench and a blue bowl\tbench, bowl\nThe cat is 3.5 m long.\n")
    names = os.listdir(root / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [int(name.split("_")[1].split(".")[0]) for name in names] == list(range(20))
    prompts = [name.split("_")[0] for name in names]
    assert prompts == ["a green bench and a blue bowl"] * 10 + ["The cat is 3.5 m long."] * 10
    assert dict(zip(names, prompts, strict=True)) == asked(root.parent)


def test_hpsv2(run, tmp_path):
    styles = {"anime": ["a girl", "a cat"], "concept-art": ["a city"], "paintings": ["a sea"], "photo": ["a man"]}
    (tmp_path / "styles").mkdir()
    for style, prompts in styles.items():
        (tmp_path / "styles" / f"{style}.json").write_text(json.dumps(prompts))
    root = run("hpsv2", tmp_path / "styles")
    for style in os.listdir(root):  # every entry is taken for a style
        for index, _ in enumerate(styles.pop(style)):
            with Image.open(root / style / f"{index:05d}.jpg") as image:
                assert image.format == "JPEG"
                assert json.loads(image.info["comment"])["prompt"]
    assert not styles


def test_parti(run):
    root = run("parti", 'Prompt\tCategory\nbond\tAbstract\n"a sign that says ""stop"""\tWorld\n')
    assert asked(root.parent) == {"0.png": "bond", "1.png": 'a sign that says "stop"'}
    assert sorted(os.listdir(root)) == ["0.png", "1.png"]


def test_coco(run):
    """The place of the longest caption so far, over all images: 2 of image 3 stands where image 7 has a longer 0."""
    captions = {3: ["short", "the longest of all"], 7: ["longer than 1", "tiny"], 9: ["a", "b"]}
    flat = [(image, text) for image in (9, 3, 7) for text in captions[image]]
    annotations = [{"image_id": image, "id": 100 + i, "caption": text} for i, (image, text) in enumerate(flat)]
    document = {"images": [{"id": image} for image in captions], "annotations": annotations}
    root = run("coco", json.dumps(document))
    assert asked(root.parent) == {"103.png": "the longest of all", "105.png": "tiny", "101.png": "b"}
    assert len(os.listdir(root)) == 3


def test_llamagen(run):
    root = run("llamagen", "Prompt\n" + "".join(f"prompt {i}\n" for i in range(12)))
    names = sorted(
        (root / "images").glob("*.png"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)]
    )
    captions = (root / "captions.txt").read_text().splitlines()
    assert {path.name: caption for path, caption in zip(names, captions, strict=True)} == asked(root)


def test_plain_numbers_images_through(run):
    root = run("plain", "a cat\n\na dog\n", images_per_prompt=2)
    assert list(asked(root.parent).items()) == [
        ("000000.png", "a cat"),
        ("000001.png", "a cat"),
        ("000002.png", "a dog"),
        ("000003.png", "a dog"),
    ]


@pytest.mark.parametrize(
    ("layout", "text", "message"),
    [
        ("plain", "\n", "holds no prompt"),
        ("geneval", '{"prompt": "a cat"}', "line 1: expected an object with tag and prompt"),
        ("geneval", "a cat", "line 1 is no JSON"),
        ("t2i-compbench", "a cat\n../a dog", "line 2: expected a prompt without"),
        ("t2i-compbench", "a_cat", "line 1: expected a prompt without"),
        ("t2i-compbench", "a cat " * 40, "at most 200 bytes"),
        ("hpsv2", '{"../x": ["a cat"]}', "a list of prompts for each style"),
        ("hpsv2", "[]", "lists of prompts by style"),
        ("parti", "Text\na cat", "a column Prompt"),
        ("coco", '{"images": []}', "COCO's captions"),
    ],
)
def test_what_is_no_prompt_file_is_refused(run, tmp_path, layout, text, message):
    with pytest.raises(ValueError, match=message):
        run(layout, text)
    assert not (tmp_path / "run").exists()


def test_numbers_of_images_that_nobody_reads_are_refused(run):
    with pytest.raises(ValueError, match="images_per_prompt: expected 1 for parti, got 2"):
        run("parti", "Prompt\na cat\n", images_per_prompt=2)
    with pytest.raises(ValueError, match=r"unknown 'coco17'; known layouts: plain, geneval"):
        get_layout("coco17")


def test_the_page_of_the_docs_names_every_layout():
    page = Path(evaluate.__file__).parents[2] / "docs" / "evaluation.md"
    assert all(f"`{name}`" in page.read_text(encoding="utf-8") for name in LAYOUTS)
