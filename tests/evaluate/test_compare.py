"""Tests of runs against each other: equal laws pass, and a law that is off as far as the margin does not."""

import numpy as np
import pytest
import torch

from sjd_engine.evaluate.compare import (
    MARGIN,
    equivalence,
    frechet_distance,
    kernel_distance,
    two_sample_accuracy,
)
from sjd_engine.evaluate.pretrained import MissingWeightsError, clip_score, found, hps_v2
from sjd_engine.evaluate.score import table

N = 400


def test_equivalence_is_shown_only_inside_the_margin():
    """N = 400 pairs with a deviation of 0.3: TOST passes for equal laws and fails for one that is off by the margin."""
    generator = np.random.default_rng(0)
    mine, reference = generator.normal(-2.4, 0.21, (2, N))
    assert equivalence(mine, reference).shown
    assert not equivalence(mine + MARGIN, reference).shown
    assert not equivalence(mine - MARGIN, reference).shown
    assert not equivalence(mine[:9], reference[:9]).shown  # too few to say anything
    result = equivalence(mine, reference)
    assert result.low < result.difference < result.high
    assert (result.low > -MARGIN and result.high < MARGIN) == result.shown


def test_equal_images_are_equivalent_and_one_pair_says_nothing():
    assert equivalence(np.full(5, -2.0), np.full(5, -2.0)).p == 0
    with pytest.raises(ValueError, match="two or more pairs"):
        equivalence(np.zeros(1), np.zeros(1))


def test_a_classifier_finds_grids_of_another_law_and_no_other():
    """N = 2 x 200 grids of 8 x 8 codes; in the broken ones a token in four repeats its neighbour."""
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    prompts = [f"prompt {i % 40}" for i in range(200)]
    codes = torch.randint(0, 64, (3, 200, 8, 8), generator=generator)
    vectors = torch.randn(64, 4, generator=generator)
    broken = codes[2].clone()
    broken[:, :, 1::4] = broken[:, :, 0::4]
    accuracy, chance = two_sample_accuracy(vectors[codes[0]], vectors[codes[1]], prompts)
    assert accuracy < 0.6
    assert chance > 1e-3
    accuracy, chance = two_sample_accuracy(vectors[broken], vectors[codes[1]], prompts)
    assert accuracy > 0.9
    assert chance < 1e-6


def test_distances_are_those_of_their_formulas():
    """Normal features of 1280 dimensions: the Frechet distance of laws that differ in their mean alone."""
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(48, 1280, generator=generator, dtype=torch.float64)
    shifted = features + 0.1
    assert frechet_distance(features, shifted) == pytest.approx(1280 * 0.01, rel=1e-3)
    assert kernel_distance(shifted, features)[0] > kernel_distance(features, features)[0]


def test_weights_that_are_not_here_are_named(tmp_path, monkeypatch):
    with pytest.raises(MissingWeightsError, match=r"FID needs weights, and .*none.pth is not there"):
        found("FID", None, tmp_path / "none.pth", "--inception FILE")
    with pytest.raises(MissingWeightsError, match="--hpsv2 FILE"):
        hps_v2([], [], tmp_path / "none.pt")
    with pytest.raises(MissingWeightsError, match="--clip FOLDER"):
        clip_score([], [], tmp_path / "clip")


def test_a_table_has_the_columns_that_were_computed():
    rows = [{"run": "maximal", "images": 4, "nfe": 60.04, "fd_effnet": 1.5}, {"run": "ar", "images": 4, "nfe": 256.0}]
    assert table(rows).splitlines() == [
        "| run | images | NFE | FD-EffNet |",
        "| --- | --- | --- | --- |",
        "| maximal | 4 | 60.0 | 1.500 |",
        "| ar | 4 | 256.0 |  |",
    ]
