"""The record of a run: what it was asked for, and every image with the hash of its file."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sjd_engine.evaluate.layouts import Shot
from sjd_engine.files import written_whole
from sjd_engine.statistics import read_lines

NAME = "manifest.jsonl"
DONE, FAILED = "done", "failed"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Manifest:
    """`manifest.jsonl`: the settings of the run in its first line, then a line for each image as it is complete.

    A run that goes on keeps an image only where its line says the same prompt and seed and its file has the hash in the
    line; the others are drawn again.

    Args:
        folder: of the run.
        settings: JSON values that every image depends on.
        shots: the images of the run.
        resume: go on with what there is.
    Raises: ValueError where the folder holds another run, or one to go on with and `resume` is False.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], shots: Iterable[Shot], *, resume: bool):
        self.path = folder / NAME
        shots = list(shots)
        records: list[dict[str, Any]] = []
        if self.path.exists():
            if not resume:
                raise ValueError(f"output: {str(folder)!r} holds a run; go on with --resume, or name another folder")
            records = self._kept(settings, {shot.file: shot for shot in shots})
        kept = {record["file"] for record in records}
        self.todo = [shot for shot in shots if shot.file not in kept]
        self.num_kept = len(kept)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as file:
            for record in ({"run": settings}, *records):
                file.write(as_line(record))

    def _kept(self, settings: dict[str, Any], shots: dict[str, Shot]) -> list[dict[str, Any]]:
        header, records = read_run(self.path.parent)
        for name in sorted({*settings, *header}):
            if header.get(name) != settings.get(name):
                raise ValueError(
                    f"output: {str(self.path.parent)!r} holds a run whose {name} is {header.get(name)!r}, not "
                    f"{settings.get(name)!r}; name another folder"
                )
        good = {}
        for record in records:
            shot = shots.get(record["file"])
            asked = shot is not None and (shot.prompt, shot.seed) == (record["prompt"], record["seed"])
            if asked and record["status"] == DONE and self._has(record):
                good[record["file"]] = record
        return list(good.values())

    def _has(self, record: dict[str, Any]) -> bool:
        path = self.path.parent / record["file"]
        return path.is_file() and sha256(path.read_bytes()) == record["sha256"]

    def add(self, record: dict[str, Any]) -> None:
        """A line more, at once."""
        with self.path.open("ab") as file:
            file.write(as_line(record))


def as_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings, records of the images) of a run. Raises: ValueError where the folder holds none."""
    path = folder / NAME
    lines = read_lines(path) if path.is_file() else []
    if not lines or "run" not in lines[0]:
        raise ValueError(f"{str(folder)!r}: expected a folder that `sjd eval generate` wrote, with {NAME} in it")
    return lines[0]["run"], lines[1:]


def read_images(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's images, in the order of the run. Raises: ValueError where some are missing."""
    settings, records = read_run(folder)
    images = sorted((record for record in records if record["status"] == DONE), key=lambda record: record["index"])
    if len(images) != settings["num_images"]:
        raise ValueError(
            f"{str(folder)!r}: holds {len(images)} of {settings['num_images']} images; `sjd eval generate --resume` "
            "draws the others"
        )
    return images
