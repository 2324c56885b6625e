"""Scores that take somebody's trained network: computed where its weights lie on this machine, never downloaded."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sjd_engine.errors import MissingExtraError, SJDError, require
from sjd_engine.evaluate.features import pixels

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it
CLIP = "openai/clip-vit-base-patch16"
HPSV2 = "HPS_v2_compressed.pt"  # as hpsv2 keeps version 2.0; HPS_v2.1_compressed.pt is another scale
SUFFIXES = (".png", ".jpg", ".jpeg")


class MissingWeightsError(SJDError):
    """A score whose network is not on this machine."""


def found(score: str, given: Path | None, usual: Path, option: str) -> Path:
    """The file of weights. Raises: MissingWeightsError that says where it would be found."""
    path = usual if given is None else given
    if not path.exists():
        raise MissingWeightsError(f"{score} needs weights, and {path} is not there; name the file: {option}")
    return path


def fid(images: Sequence[Path], real: Path, weights: Path | None) -> float:
    """The Frechet inception distance to the images of folder `real`, with torch-fidelity's InceptionV3 at 2048
    features; images are resized to 299x299 as TensorFlow does it.

    Raises: MissingWeightsError, MissingExtraError; ValueError where `real` holds no images.
    """
    usual = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    path = found("FID", weights, usual, "--inception FILE")
    references = [file for file in sorted(real.rglob("*")) if file.suffix.lower() in SUFFIXES]
    if len(references) < 2:
        raise ValueError(f"real: expected a folder of real images, got {str(real)!r} with {len(references)}")
    require("eval", "torchmetrics", "torch_fidelity")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path))
    for file in references:  # of many sizes
        metric.update(pixels(file)[None], real=True)
    for file in images:
        metric.update(pixels(file)[None], real=False)
    return float(metric.compute())


def clip_score(images: Sequence[Path], prompts: Sequence[str], folder: Path | None) -> float:
    """CLIP-score, 100 cos of image and prompt, with the network of a folder or of Hugging Face's cache. Images go
    through CLIP's own preprocessing, prompts are cut to its length.

    Raises: MissingWeightsError, MissingExtraError.
    Source: Hessel et al., arXiv 2104.08718, with torchmetrics' factor of 100.
    """
    require("eval", "transformers")
    from transformers import CLIPModel, CLIPProcessor

    name = CLIP if folder is None else str(folder)
    try:
        network = CLIPModel.from_pretrained(name, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
    except OSError:
        raise MissingWeightsError(
            f"CLIP-score needs weights, and {name} is not on this machine; name the folder: --clip FOLDER"
        ) from None
    scores = []
    with torch.inference_mode():
        for file, prompt in zip(images, prompts, strict=True):
            read = processor(text=[prompt], images=pixels(file), return_tensors="pt", truncation=True)
            output = network(**read)
            scores.append(100 * float((output.image_embeds * output.text_embeds).sum()))
    return max(0.0, float(np.mean(scores)))


def hps_v2(images: Sequence[Path], prompts: Sequence[str], weights: Path | None) -> float:
    """The mean human preference score by hpsv2's own network and preprocessing, of the version of the weights.

    Raises: MissingWeightsError, MissingExtraError.
    """
    path = found("HPSv2", weights, Path.home() / ".cache" / "hpsv2" / HPSV2, "--hpsv2 FILE")
    if find_spec("hpsv2") is None:
        raise MissingExtraError(
            "hpsv2: expected to be installed, and is not; pip install git+https://github.com/tgxs002/HPSv2 (the wheel "
            "lacks a file of its tokenizer)"
        )
    from hpsv2 import img_score

    img_score.initialize_model()
    network, transform = img_score.model_dict["model"], img_score.model_dict["preprocess_val"]
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    network.to("cpu").float().eval()
    tokenize = img_score.get_tokenizer("ViT-H-14")
    scores = []
    with torch.inference_mode():
        for file, prompt in zip(images, prompts, strict=True):
            with Image.open(file) as image:
                output = network(transform(image.convert("RGB"))[None], tokenize([prompt]))
            scores.append(float((output["image_features"] * output["text_features"]).sum()))
    return float(np.mean(scores))
