"""`sjd eval score`: what a run's images say, alone and beside another run's."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd_engine.errors import MissingExtraError
from sjd_engine.evaluate.compare import equivalence, frechet_distance, kernel_distance, two_sample_accuracy
from sjd_engine.evaluate.features import effnet_features
from sjd_engine.evaluate.manifest import read_images, read_run
from sjd_engine.evaluate.pretrained import MissingWeightsError, clip_score, fid, hps_v2
from sjd_engine.loading import load
from sjd_engine.sampling import SamplingParams
from sjd_engine.testing import score_tokens

Row = dict[str, Any]
COLUMNS = {  # heading: (key, format)
    "images": ("images", "d"),
    "NFE": ("nfe", ".1f"),
    "FID": ("fid", ".2f"),
    "CLIP": ("clip", ".2f"),
    "HPSv2": ("hpsv2", ".4f"),
    "FD-EffNet": ("fd_effnet", ".3f"),
    "x calibration": ("fd_ratio", ".2f"),
    "KID x 1000": ("kid_effnet", ".2f"),
    "+-": ("kid_deviation", ".2f"),
    "log p": ("log_p", ".4f"),
    "diff": ("difference", "+.4f"),
    "90 % low": ("low", "+.4f"),
    "high": ("high", "+.4f"),
    "TOST p": ("tost_p", ".1e"),
    "C2ST": ("c2st", ".3f"),
    "C2ST p": ("c2st_p", ".3f"),
}


class Run:
    """A folder that `sjd eval generate` wrote. Raises: ValueError where it is none, or incomplete."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings, _ = read_run(folder)
        self.images = read_images(folder)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def files(self) -> list[Path]:
        return [self.folder / image["file"] for image in self.images]

    @property
    def prompts(self) -> list[str]:
        return [image["prompt"] for image in self.images]

    @cached_property
    def features(self) -> Tensor:
        return effnet_features(self.files)

    @property
    def codes(self) -> Tensor:
        """[N, rows * cols]"""
        return torch.tensor([image["token_ids"] for image in self.images])

    @property
    def nfe(self) -> float:
        return float(np.mean([image["nfe"] for image in self.images]))


class Likelihood:
    """Log-probabilities of runs' tokens under one law: that of a reference run's settings, one token a pass."""

    def __init__(self, reference: Run):
        settings = reference.settings
        self.arguments: dict[str, Any] = settings["arguments"]
        self.model = load(settings["model"], settings["device"], getattr(torch, settings["dtype"]))

    def means(self, run: Run) -> np.ndarray:
        """[N] nats: the mean of each image's tokens. A token that the law excludes counts as its least likely one."""
        arguments = self.arguments
        params = SamplingParams(*(arguments[name] for name in ("guidance_scale", "temperature", "top_k", "top_p")))
        size = arguments["height"], arguments["width"]
        schedule, negative = self.model.schedule(*size), arguments.get("negative_prompt")
        parts = []
        for prompt, images in groupby(run.images, key=lambda image: image["prompt"]):
            codes = torch.tensor([image["token_ids"] for image in images], device=self.model.device)
            context = self.model.build_prompt(prompt, negative, *size)
            with torch.inference_mode():
                scores = score_tokens(self.model, context, codes, params, schedule).log_probs
            least = scores[scores.isfinite()].min()
            parts.append(scores.clamp_min(least).mean(1).cpu().numpy())
        return np.concatenate(parts)

    def vectors(self, run: Run) -> Tensor:
        """[N, rows, cols, E]: of the codes, as the detokenizer knows them."""
        schedule = self.model.schedule(self.arguments["height"], self.arguments["width"])
        vectors = self.model.detokenizer.code_vectors()[run.codes]
        return vectors.unflatten(1, (schedule.rows, schedule.cols))


def score(
    runs: Sequence[Path],
    *,
    against: Path | None = None,
    calibration: Path | None = None,
    real: Path | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
    hpsv2: Path | None = None,
) -> tuple[list[Row], list[str]]:
    """Score runs by every measure that can be computed here.

    Args:
        runs: folders that `sjd eval generate` wrote.
        against: the run that the others are compared with; None leaves the comparisons out.
        calibration: another run of that method with other seeds, whose distance to it is the unit of distances.
        real: folder of real images, for FID.
        inception, clip, hpsv2: weights; None looks where their packages keep them.
    Returns: a row for each run, and what was not computed and why.
    Raises: ValueError for folders that are no complete runs, or runs that cannot be compared.
    """
    chosen = [Run(folder) for folder in runs]
    reference = None if against is None else Run(against)
    notes: list[str] = []
    rows: list[Row] = [{"run": run.name, "images": len(run.images), "nfe": run.nfe} for run in chosen]
    for run, row in zip(chosen, rows, strict=True):
        row |= networks_say(run, real, inception, clip, hpsv2, notes)
    if reference is not None:
        comparison = Comparison(reference)
        unit = None if calibration is None else comparison.distance(Run(calibration))
        for run, row in zip(chosen, rows, strict=True):
            row |= comparison.of(run)
            if unit is not None:
                row["fd_ratio"] = row["fd_effnet"] / unit
    return rows, notes


def networks_say(
    run: Run, real: Path | None, inception: Path | None, clip: Path | None, hpsv2: Path | None, notes: list[str]
) -> Row:
    """The scores whose networks are on this machine; `notes` get a line for each that is not."""
    measures: dict[str, Callable[[], float]] = {
        "clip": lambda: clip_score(run.files, run.prompts, clip),
        "hpsv2": lambda: hps_v2(run.files, run.prompts, hpsv2),
    }
    if real is not None:
        measures["fid"] = lambda: fid(run.files, real, inception)
    row = {}
    for name, measure in measures.items():
        try:
            row[name] = measure()
        except (MissingWeightsError, MissingExtraError) as error:
            if str(error) not in notes:
                notes.append(str(error))
    return row


class Comparison:
    """Runs beside a reference run."""

    def __init__(self, reference: Run):
        self.reference, self.likelihood = reference, Likelihood(reference)
        self.means, self.vectors = self.likelihood.means(reference), self.likelihood.vectors(reference)

    def distance(self, run: Run) -> float:
        return frechet_distance(run.features, self.reference.features)

    def of(self, run: Run) -> Row:
        """All measures of `compare`. Raises: ValueError where the runs have not the same prompts and model."""
        mine, theirs = run.settings["model"], self.reference.settings["model"]
        if run.prompts != self.reference.prompts or mine != theirs:
            raise ValueError(f"against: {run.name} and {self.reference.name} must have the same prompts and model")
        kid, deviation = kernel_distance(run.features, self.reference.features)
        means = self.likelihood.means(run)
        tost = equivalence(means, self.means)
        accuracy, chance = two_sample_accuracy(self.likelihood.vectors(run), self.vectors, run.prompts)
        return {
            "fd_effnet": self.distance(run),
            "kid_effnet": 1000 * kid,
            "kid_deviation": 1000 * deviation,
            "log_p": float(means.mean()),
            "difference": tost.difference,
            "low": tost.low,
            "high": tost.high,
            "tost_p": tost.p,
            "equivalent": tost.shown,
            "c2st": accuracy,
            "c2st_p": chance,
        }


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with the columns that any of them has."""
    columns = {head: column for head, column in COLUMNS.items() if any(column[0] in row for row in rows)}
    lines = [["run", *columns], ["---"] * (1 + len(columns))]
    for row in rows:
        cells = (format(row[key], form) if key in row else "" for key, form in columns.values())
        lines.append([row["run"], *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
