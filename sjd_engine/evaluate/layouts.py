"""Prompt files, and the folders that the evaluators of these prompts read.

Each layout follows the code that will read it; `source` names the file. All images of a run lie in its folder
`images/`, because some evaluators take every entry of the folder they are given for an image or a style.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_NAME = 200  # bytes of a prompt in the name of a file, of the 255 that file systems allow


@dataclass(frozen=True)
class Entry:
    """A prompt of a file.

    key: what the evaluator knows it by: a row, a caption's number, a style's image.
    metadata: the line of the prompt file, where the evaluator wants it beside the images.
    """

    text: str
    key: str
    metadata: str = ""


@dataclass(frozen=True)
class Shot:
    """An image to draw: `file` is its path below the folder of the run, `index` its place in the run."""

    index: int
    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Layout:
    """How one evaluator wants its images.

    read: the prompts of a file or folder.
    place: (entry, number among the images of its prompt, number in the run) -> path below the folder of the run.
    source: the code that this was read in.
    images_per_prompt: what its protocol asks for.
    several: other numbers of them make sense to it.
    beside: text files that it reads beside the images, by path.
    root: the folder to give it, below that of the run.
    """

    name: str
    read: Callable[[Path], list[Entry]]
    place: Callable[[Entry, int, int], str]
    source: str
    images_per_prompt: int = 1
    several: bool = False
    beside: Callable[[list[Entry]], dict[str, str]] = lambda entries: {}
    root: str = "images"

    def shots(self, entries: list[Entry], seed: int, images_per_prompt: int | None) -> list[Shot]:
        """The images of a run; image i has seed + i. Raises: ValueError for a number that the evaluator cannot read."""
        count = self.images_per_prompt if images_per_prompt is None else images_per_prompt
        if count < 1 or (count > 1 and not self.several):
            raise ValueError(
                f"images_per_prompt: expected {'>= 1' if self.several else '1'} for {self.name}, got {count}"
            )
        shots: list[Shot] = []
        for entry in entries:
            for number in range(count):
                index = len(shots)
                shots.append(Shot(index, self.place(entry, number, index), entry.text, seed + index))
        return shots


# ------------------------------------------------------------------------------------------------------- prompt files


def read_text(path: Path) -> list[Entry]:
    """A prompt a line; blank lines are left out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Entry(line, str(i)) for i, line in enumerate(filter(None, lines))]


def read_geneval(path: Path) -> list[Entry]:
    """evaluation_metadata.jsonl: the evaluator wants each line back."""
    entries: list[Entry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = parse(path, line, f"line {number}")
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or "tag" not in record:
            raise ValueError(f"{path}: line {number}: expected an object with tag and prompt, got {line[:60]!r}")
        entries.append(Entry(record["prompt"], f"{len(entries):05d}", line))
    return entries


def read_t2i_compbench(path: Path) -> list[Entry]:
    """One category's file, a prompt a line up to the first tab. A prompt becomes the name of a file, up to the first
    underscore, so it must be fit for one."""
    entries: list[Entry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("\t")[0]
        if not text.strip() or re.search(r"[/\\_\0]", text) or len(text.encode()) > LONGEST_NAME:
            raise ValueError(
                f"{path}: line {number}: expected a prompt without / \\ _ of at most {LONGEST_NAME} bytes, because the "
                f"evaluator reads it from the file's name, got {text[:60]!r}"
            )
        entries.append(Entry(text, str(len(entries))))
    return entries


def read_hpsv2(path: Path) -> list[Entry]:
    """The folder of STYLE.json lists that hpsv2 keeps, or one JSON object of them by style."""
    if path.is_dir():
        styles = {file.stem: parse(file, file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))}
    else:
        styles = parse(path, path.read_text(encoding="utf-8"))
    if not isinstance(styles, dict) or not styles:
        raise ValueError(f"{path}: expected lists of prompts by style: anime, concept-art, paintings and photo")
    entries = []
    for style, prompts in styles.items():
        if not re.fullmatch(r"[\w-]+", style) or not isinstance(prompts, list):
            raise ValueError(f"{path}: expected a list of prompts for each style, got {style!r}: {str(prompts)[:40]}")
        entries += [Entry(text, f"{style}/{i:05d}") for i, text in enumerate(prompts)]
    return entries


def read_tsv(path: Path) -> list[Entry]:
    """The column "Prompt" of a table with tabs, as PartiPrompts.tsv and LlamaGen's coco_captions.csv have it."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or "Prompt" not in rows[0]:
        raise ValueError(f"{path}: expected a table with tabs and a column Prompt")
    return [Entry(row["Prompt"], str(i)) for i, row in enumerate(rows)]


def read_coco(path: Path) -> list[Entry]:
    """captions_val2017.json: one caption an image, the one that the script takes which reads them.

    It looks for the longest caption, but never forgets the longest of the images before: the place (first, second, ...)
    of the longest caption so far is what it takes of every image until a longer one comes.
    """
    document = parse(path, path.read_text(encoding="utf-8"))
    try:
        captions: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(annotation)
        entries, longest, place = [], 0, 0
        for image in sorted(captions):
            for i, annotation in enumerate(captions[image]):
                if len(annotation["caption"]) > longest:
                    longest, place = len(annotation["caption"]), i
            chosen = captions[image][place]
            entries.append(Entry(chosen["caption"], str(chosen["id"])))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: expected COCO's captions with images and annotations: {error!r}") from None
    return entries


def parse(path: Path, text: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {where or 'the file'} is no JSON: {error}") from None


# ------------------------------------------------------------------------------------------------------------ layouts


def numbered(entry: Entry, number: int, index: int) -> str:
    return f"images/{index:06d}.png"


def by_key(entry: Entry, number: int, index: int) -> str:
    return f"images/{entry.key}.png"


def metadata(entries: list[Entry]) -> dict[str, str]:
    return {f"images/{entry.key}/metadata.jsonl": entry.metadata + "\n" for entry in entries}


def captions(entries: list[Entry]) -> dict[str, str]:
    return {"captions.txt": "".join(f"{' '.join(entry.text.split())}\n" for entry in entries)}


OFFICIAL = "tyshiwo1/Accelerating-T2I-AR-with-SJD evaluation_metrics.py, dataset_tools/dataset_templates.py"
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("plain", read_text, numbered, "any evaluator that takes a folder of images", several=True),
        Layout(
            "geneval",
            read_geneval,
            lambda entry, number, index: f"images/{entry.key}/samples/{number:05d}.png",
            "djghosh13/geneval evaluation/evaluate_images.py",
            images_per_prompt=4,
            several=True,
            beside=metadata,
        ),
        Layout(
            "t2i-compbench",
            read_t2i_compbench,
            lambda entry, number, index: f"images/samples/{entry.text}_{index:06d}.png",
            "Karine-Huang/T2I-CompBench BLIPvqa_eval/BLIP_vqa.py, UniDet_eval/*.py, CLIPScore_eval/CLIP_similarity.py",
            images_per_prompt=10,
            several=True,
        ),
        Layout(
            "hpsv2",
            read_hpsv2,
            lambda entry, number, index: f"images/{entry.key}.jpg",
            "tgxs002/HPSv2 hpsv2/evaluation.py",
        ),
        Layout("parti", read_tsv, by_key, OFFICIAL),
        Layout("coco", read_coco, by_key, OFFICIAL),
        Layout(
            "llamagen",
            read_tsv,
            numbered,
            "FoundationVision/LlamaGen evaluations/t2i/evaluation.py",
            beside=captions,
            root="",
        ),
    )
}


def get_layout(name: str) -> Layout:
    """The layout called `name`. Raises: ValueError that lists the known names."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: unknown {name!r}; known layouts: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
