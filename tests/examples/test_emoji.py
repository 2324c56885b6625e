"""The parts of the training scripts that the shipped weights depend on."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sjd_engine.models.detokenizers.fsq import FSQConfig, codes_to_values

SCRIPTS = Path(__file__).parents[2] / "examples" / "emoji"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_encoder_and_detokenizer_mean_the_same_by_a_code(script):
    torch.manual_seed(0)
    encoder = script("train_tokenizer").FSQEncoder(FSQConfig(channels=16))
    values, codes = encoder(3 * torch.randn(4, 3, 64, 64))
    assert codes.shape == (4, 16, 16)
    assert len(codes.unique()) > 50
    torch.testing.assert_close(codes_to_values(codes, FSQConfig().levels).permute(0, 3, 1, 2), values)


def test_encoder_reaches_every_level_and_none_beyond(script):
    encoder = script("train_tokenizer").FSQEncoder(FSQConfig(channels=16))
    encoder.conv_out.weight.data.mul_(100)
    values, codes = encoder(torch.randn(16, 3, 64, 64))
    assert codes.min() >= 0
    assert codes.max() < 1000
    for channel, level in enumerate(FSQConfig().levels):
        assert len(values[:, channel].detach().round(decimals=3).unique()) == level


def test_captions_name_what_the_picture_shows(script):
    data = script("data")
    glyph = data.Glyph("noto", "1f34e", "red apple", "apple", "food fruit", "")
    compositor = object.__new__(data.Compositor)
    compositor.glyphs = [glyph]
    rng = np.random.default_rng(0)
    captions = {compositor.caption(0, "wood", rng) for _ in range(300)}
    assert {"noto red apple on wood", "a red apple on wood", "red apple on wood", "a red apple"} <= captions
    assert all("apple" in caption for caption in captions)


def test_a_larger_canvas_shows_a_larger_glyph(script):
    """It covers the same share of the picture."""
    pytest.importorskip("skimage", reason="backgrounds need pip install -e '.[train]'")
    data = script("data")
    glyph = data.Glyph("noto", "1f534", "red circle", "red circle", "", "")
    disc = np.zeros((1, 64, 64, 4), np.uint8)
    disc[0, 16:48, 16:48] = (255, 0, 0, 255)
    shares = []
    for canvas in (64, 128):
        compositor = data.Compositor([glyph], disc, canvas)
        words, picture = compositor.compose(0, np.random.default_rng(1))
        assert picture.shape == (canvas, canvas, 3)
        assert words in script("prepare").BACKGROUNDS
        shares.append((picture[..., 0] > 180).mean() - (picture[..., 1] > 180).mean())
    assert shares[0] == pytest.approx(shares[1], abs=0.03)
    assert shares[0] > 0.1


@pytest.mark.parametrize("name", ["purple heart", "green square"])
def test_the_shown_compositions_are_held_out(script, name):
    data = script("data")
    assert data.held_out_concept(data.Glyph("noto", "1f000", name, name, "", ""))
    assert not data.held_out_concept(data.Glyph("noto", "1f34e", "red apple", "apple", "", ""))
