"""Recipes that draw their image again, the record of a window's way, and its figures."""

import base64
import json
import re

import numpy as np
import pytest

from sjd_engine import Engine
from sjd_engine.images import save_png
from sjd_engine.plot import offset_acceptance, plot
from sjd_engine.recipe import read_recipe, recipe_of, redraw
from sjd_engine.statistics import read_lines, read_statistics
from sjd_engine.trajectory import BEFORE, COMMITTED, OUTSIDE, watch, write_statistics

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("emoji", max_batch_size=2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "sjd++", "reuse_threshold": 0.4, "window_size": 24, "top_k": 50},
        {"method": "maximal", "tree": (2, 2), "window_size": 16, "init": "random"},
    ],
    ids=lambda arguments: arguments["method"],
)
def test_a_recipe_draws_its_image_again(engine, tmp_path, arguments):
    out = engine.generate(PROMPT, seed=5, num_images_per_prompt=2, progress=False, **arguments)
    save_png(out.images[1], tmp_path / "apple.png", recipe_of(engine, "emoji", PROMPT, out, 1))
    recipe = read_recipe(tmp_path / "apple.png")
    assert recipe["seed"] == 6
    assert set(recipe["versions"]) == {"sjd-engine", "torch"}
    assert {"guidance_scale", "temperature", "top_p", "init", "height", "width", "dtype"} <= set(recipe)
    same, stats = redraw(tmp_path / "apple.png", tmp_path / "again.png")
    assert same
    assert stats.nfe == recipe["nfe"]
    assert read_recipe(tmp_path / "again.png") == recipe


def test_an_image_without_a_recipe_is_refused(tmp_path):
    save_png(Engine("emoji").generate(PROMPT, window_size=32, progress=False).images[0], tmp_path / "x.png", {})
    with pytest.raises(ValueError, match="another version"):
        read_recipe(tmp_path / "x.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="has none"):
        read_recipe(tmp_path / "text.png")


@pytest.fixture(scope="module")
def watched(engine):
    out, trajectories = watch(engine, PROMPT, method="maximal", window_size=16, seed=1, num_images_per_prompt=3)
    return out, trajectories


def test_watching_changes_nothing(engine, watched):
    plain = engine.generate(PROMPT, window_size=16, seed=1, num_images_per_prompt=3, progress=False)
    assert plain.token_ids.equal(watched[0].token_ids)
    assert plain.images[2].tobytes() == watched[0].images[2].tobytes()


def test_a_trajectory_tells_what_the_statistics_tell(watched):
    out, trajectories = watched
    for stats, rows in zip(out.stats, trajectories, strict=True):
        letters = np.array([list(row) for row in rows])
        assert letters.shape == (stats.nfe, stats.num_tokens)
        assert ((letters == COMMITTED).sum(1) == stats.committed_per_pass).all()
        assert ((letters == COMMITTED).argmax(0) == stats.acceptance_map.flatten()).all()
        assert ((letters == BEFORE).sum(1) == np.cumsum([0, *stats.committed_per_pass[:-1]])).all()
        drafts = (letters[:-1] != OUTSIDE).sum(1) - np.cumsum(stats.committed_per_pass[:-1])
        left = stats.num_tokens - np.cumsum(stats.committed_per_pass[:-1])
        assert (drafts == np.minimum(15, left)).all()


def test_windows_that_are_no_line_have_no_trajectory(engine):
    assert watch(engine, PROMPT, window_size=64, tree=(2, 2), output_type="codes")[1] == [[]]


def test_offsets_count_what_was_drafted():
    """By hand: windows 3, 3, 3 of five tokens commit 1, 3 and 1; the last has no room for a draft."""
    record = {"num_tokens": 5, "window_sizes": [3, 3, 3], "committed_per_pass": [1, 3, 1]}
    drafted, reached = offset_acceptance([record])
    np.testing.assert_equal(drafted, [0.5, 0.5, np.nan])
    np.testing.assert_equal(reached, [0.5, 1.0, np.nan])


def test_figures_and_a_page_that_needs_nothing_else(watched, tmp_path):
    pytest.importorskip("matplotlib")
    write_statistics(tmp_path / "maximal.jsonl", PROMPT, *watched)
    assert len(read_statistics(tmp_path / "maximal.jsonl")) == 3
    written = plot([tmp_path / "maximal.jsonl"], tmp_path / "report")
    assert [path.name for path in written] == [
        "acceleration_map.png",
        "acceptance.png",
        "offsets.png",
        "trajectory.png",
        "report.html",
    ]
    page = written[-1].read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|@import|<script", page)
    inside = [base64.b64decode(code) for code in re.findall(r"base64,([^\"]+)", page)]
    assert inside == [path.read_bytes() for path in written[:-1]]


def test_a_torn_last_line_is_left_out_and_others_are_errors(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"nfe": 1}) + '\n{"nfe": 2')
    assert read_lines(path) == [{"nfe": 1}]
    with pytest.raises(ValueError, match="holds no statistics"):
        read_statistics(path)
    path.write_text('{"nfe": 2\n{"nfe": 1}\n')
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        read_lines(path)
