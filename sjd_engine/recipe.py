"""Recipes: what draws an image again, as it stands inside its file."""

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from sjd_engine.engine import Engine
from sjd_engine.images import RECIPE, save_png
from sjd_engine.outputs import Generation, ImageStats

VERSIONED = ("sjd-engine", "torch")
# What a recipe tells beside the arguments of `Engine.generate`.
ABOUT = ("model", "device", "dtype", "nfe", "versions")


def surroundings(engine: Engine, model: str) -> dict[str, Any]:
    """What an image depends on beside its arguments: model, device, dtype and versions."""
    transformer = engine.model.transformer
    return {
        "model": model,
        "device": engine.model.device.type,
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in VERSIONED},
    }


def recipe_of(engine: Engine, model: str, prompt: str, generation: Generation, index: int = 0) -> dict[str, Any]:
    """The recipe of image `index` of `generation`, whose prompt was `prompt`; JSON values.

    Args:
        model: the name the engine was made with.
    """
    return {
        "prompt": prompt,
        "seed": generation.seeds[index],
        **generation.arguments,
        **surroundings(engine, model),
        "nfe": generation.stats[index].nfe,
    }


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe inside a PNG. Raises: ValueError where there is none; OSError where there is no such file."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(RECIPE)
    except UnidentifiedImageError:
        text = None
    if text is None:
        raise ValueError(f"recipe: {str(path)!r} has none: expected a PNG that this package wrote")
    recipe = json.loads(text)
    known = {*inspect.signature(Engine.generate).parameters, *ABOUT}
    if not {"prompt", "seed", "model"} <= set(recipe) <= known:
        raise ValueError(f"recipe: that of {str(path)!r} is of another version, which wrote {', '.join(recipe)}")
    return recipe


def redraw(source: Path, target: Path, device: str | None = None) -> tuple[bool, ImageStats]:
    """Draw the image of a PNG again from its recipe, and write it to `target`.

    Args:
        device: None for that of the recipe.
    Returns: whether the pixels are the same, and the statistics.
    Raises: ValueError where `source` has no recipe.
    """
    recipe = read_recipe(source)
    arguments = {name: value for name, value in recipe.items() if name not in ABOUT}
    engine = Engine(recipe["model"], device=device or recipe["device"], dtype=getattr(torch, recipe["dtype"]))
    out = engine.generate(**arguments)
    with Image.open(source) as first:
        same = first.convert("RGB").tobytes() == out.images[0].tobytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_png(out.images[0], target, recipe_of(engine, recipe["model"], recipe["prompt"], out))
    return same, out.stats[0]
