"""Pixels: conversion and files."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from torch import Tensor

from sjd_engine.files import written_whole

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
RECIPE = "sjd_engine"  # the text chunk of a PNG
JPEG_QUALITY = 95


def convert(pixels: Tensor, output_type: str) -> Any:
    """pixels [N, 3, H, W] in [0, 1] as "pil" (list of images), "np" ([N, H, W, 3] float32) or "pt" (itself)."""
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in (array * 255).round().astype("uint8")]


def encode_png(image: Image.Image, recipe: Mapping[str, Any] | None) -> bytes:
    """A PNG with the recipe in its text chunks.

    Args:
        recipe: JSON values; stored as JSON in "sjd_engine" and as the prompt line other tools read in "parameters".
            None for an image without.
    """
    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_text(RECIPE, json.dumps(recipe))
        settings = ", ".join(f"{key}: {value}" for key, value in recipe.items() if key != "prompt")
        info.add_text("parameters", f"{recipe.get('prompt', '')}\n{settings}")
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def encode_jpeg(image: Image.Image, recipe: Mapping[str, Any]) -> bytes:
    """A JPEG with the recipe as JSON in its comment, for evaluators that read nothing else."""
    file = io.BytesIO()
    comment = json.dumps(recipe).encode()
    image.save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0, comment=comment)
    return file.getvalue()


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Write a PNG whole or not at all, see `encode_png`. Raises: OSError where the folder cannot be written."""
    with written_whole(Path(path)) as file:
        file.write(encode_png(image, recipe))
