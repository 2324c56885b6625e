"""CLIP-score with random weights in the layout that is published."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sjd_engine.evaluate.pretrained import clip_score

PROMPTS = ["a red apple", "a blue car", "z" * 400]  # the last is longer than CLIP reads
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def clip(tmp_path):
    """A folder with a tiny CLIP, its tokenizer and its preprocessing."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    begin, end = len(tokens) - 2, len(tokens) - 1
    text = TOWER | {"vocab_size": len(tokens), "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    vision = TOWER | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77
    )
    resize = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(resize, tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_clip_score_is_the_mean_of_100_cos(clip, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    generator, files = np.random.default_rng(0), []
    for number in range(len(PROMPTS)):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(files[-1])
    network, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    read = processor(
        text=PROMPTS, images=[Image.open(file) for file in files], return_tensors="pt", padding=True, truncation=True
    )
    with torch.inference_mode():
        images = network.get_image_features(pixel_values=read["pixel_values"])
        texts = network.get_text_features(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
    images, texts = (getattr(features, "pooler_output", features) for features in (images, texts))
    each = 100 * torch.cosine_similarity(images, texts)
    assert clip_score(files, PROMPTS, clip) == pytest.approx(max(0.0, each.mean().item()), abs=1e-3)
    best = int(each.argmax())
    assert clip_score(files[best : best + 1], PROMPTS[best : best + 1], clip) == pytest.approx(
        each[best].item(), abs=1e-3
    )
    assert each[best] > 0
