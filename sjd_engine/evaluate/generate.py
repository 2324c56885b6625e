"""`sjd eval generate`: the images of a prompt file, in the folder that its evaluator reads."""

import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from tqdm import tqdm

from sjd_engine.engine import Engine
from sjd_engine.errors import SJDError
from sjd_engine.evaluate.layouts import Layout, Shot
from sjd_engine.evaluate.manifest import DONE, FAILED, NAME, Manifest, sha256
from sjd_engine.files import write_whole
from sjd_engine.images import encode_jpeg, encode_png
from sjd_engine.outputs import Finished
from sjd_engine.recipe import recipe_of, surroundings
from sjd_engine.request import AUTO, make_request
from sjd_engine.statistics import as_record


@dataclass(frozen=True)
class Artist:
    """Draws images; plain values, so that another process can make the same engine.

    Args:
        model: "emoji" or a checkpoint folder. device, batch_invariant: see `Engine`.
        batch_size: images decoded together.
        arguments: of `Engine.generate`.
    """

    model: str
    arguments: dict[str, Any]
    device: str | None = None
    batch_size: int = 8
    batch_invariant: bool | None = None

    def engine(self) -> Engine:
        return Engine(
            self.model, device=self.device, max_batch_size=self.batch_size, batch_invariant=self.batch_invariant
        )

    def settings(self, engine: Engine) -> dict[str, Any]:
        """What every image of `engine` depends on; JSON values. Among them the arguments with the defaults filled in,
        and a named window where it would be "auto": windows that follow the clock give images that nobody can draw
        again. Raises: ValueError, TypeError for bad arguments."""
        arguments = make_request(engine.model, "any", **self.arguments).arguments
        if arguments["window_size"] == AUTO:
            arguments["window_size"] = engine.model.defaults.window_size
        around = surroundings(engine, self.model)
        return {**around, "batch_invariant": engine.batch_invariant, "arguments": arguments}

    def draw(self, engine: Engine, shots: Iterable[Shot]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """(record, bytes of the file) of every image as it is complete; no bytes where it failed."""
        waiting = iter(shots)
        under_way: dict[int, Shot] = {}
        while True:
            for shot in islice(waiting, 2 * self.batch_size - len(under_way)):
                try:
                    under_way[engine.submit(shot.prompt, seed=shot.seed, **self.arguments)] = shot
                except (ValueError, TypeError) as error:  # a prompt that the model cannot take
                    yield failure(shot, error), b""
            if not engine.step() and not under_way:
                return
            for done in engine.collect():
                yield self._drawn(engine, under_way.pop(done.request_id), done)

    def _drawn(self, engine: Engine, shot: Shot, done: Finished) -> tuple[dict[str, Any], bytes]:
        if done.generation is None:
            return failure(shot, done.error), b""
        recipe = recipe_of(engine, self.model, shot.prompt, done.generation)
        encode = encode_jpeg if PurePosixPath(shot.file).suffix == ".jpg" else encode_png
        content = encode(done.generation.images[0], recipe)
        statistics = as_record(done.generation.stats[0], done.generation.token_ids[0])
        worker = f"{socket.gethostname()}:{os.getpid()}"
        return {**vars(shot), "status": DONE, "sha256": sha256(content), "worker": worker, **statistics}, content


def failure(shot: Shot, error: Exception | None) -> dict[str, Any]:
    return {**vars(shot), "status": FAILED, "error": f"{type(error).__name__}: {error}"}


class Source(Protocol):
    """What draws the images of a run: this process, or `sjd_engine.scale_out`."""

    def settings(self, artist: Artist) -> dict[str, Any]:
        """`Artist.settings` where the images will be drawn."""

    def draw(self, artist: Artist, shots: list[Shot]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """`Artist.draw` of all shots, in any order."""


class ThisProcess:
    """One engine here."""

    def settings(self, artist: Artist) -> dict[str, Any]:
        self._engine = artist.engine()
        return artist.settings(self._engine)

    def draw(self, artist: Artist, shots: list[Shot]) -> Iterator[tuple[dict[str, Any], bytes]]:
        return artist.draw(self._engine, shots)


def generate(
    prompts: Path,
    output: Path,
    layout: Layout,
    artist: Artist,
    *,
    seed: int = 0,
    images_per_prompt: int | None = None,
    limit: int | None = None,
    resume: bool = False,
    source: Source | None = None,
    progress: bool | None = None,
) -> int:
    """Draw the images of a prompt file.

    An image depends on its prompt, its seed and the settings in the manifest's first line, on nothing else. Its file is
    written whole, then its line of the manifest.

    Args:
        prompts: the file, or hpsv2's folder. output: the run's folder.
        seed: image i has seed + i.
        images_per_prompt: None for what the layout's protocol asks for.
        limit: prompts from the file's beginning; None for all.
        resume: keep the images that are there, after checking their hashes.
        source: what draws; None for this process.
        progress: a bar on stderr; None shows it on a terminal.
    Returns: images of the run that were there before.
    Raises: ValueError, TypeError for bad arguments, before anything is drawn. SJDError where some images failed: the
        manifest says which and why.
    """
    entries = layout.read(prompts)[:limit]
    if not entries:
        raise ValueError(f"prompts: {str(prompts)!r} holds no prompt")
    shots = layout.shots(entries, seed, images_per_prompt)
    if len({shot.file for shot in shots}) < len(shots):
        raise ValueError(
            f"prompts: {str(prompts)!r} gives two images one file; expected prompts with numbers of their own"
        )
    source = ThisProcess() if source is None else source
    settings = {"layout": layout.name, "num_images": len(shots), **source.settings(artist)}
    artist = replace(artist, arguments=settings["arguments"])
    manifest = Manifest(output, settings, shots, resume=resume)
    for file, text in layout.beside(entries).items():
        write_whole(output / file, text.encode())
    failed = 0
    with tqdm(
        total=len(shots), initial=manifest.num_kept, unit="image", disable=None if progress is None else not progress
    ) as bar:
        for record, content in source.draw(artist, manifest.todo) if manifest.todo else ():
            if record["status"] == DONE:
                write_whole(output / record["file"], content)
            else:
                failed += 1
            manifest.add(record)
            bar.update()
    if failed:
        raise SJDError(f"{failed} of {len(shots)} images failed; {output / NAME} says why, --resume tries them again")
    return manifest.num_kept
