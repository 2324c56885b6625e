"""bench/kernels.py on tiny shapes: what it counts and prints, never how fast anything is."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sjd_engine import native
from sjd_engine.kernels import reference

FILE = Path(__file__).parents[1] / "bench" / "kernels.py"
TINY = ["--passes", "2", "--warmup", "1", "--peak-gbps", "10", "--targets", "--top-k", "20"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_kernels", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("method", ["maximal", "sjd", "exact"])
def test_the_port_decides_as_the_reference(bench, capsys, method):
    assert bench.main([*TINY, "--methods", method, "--shapes", "5x60", "--backends", "four-kernel"]) == 0
    eager, port = last_line(capsys)["rows"]
    assert (eager["backend"], port["backend"]) == ("eager", "four-kernel")
    assert (eager["correct"], port["correct"]) == (True, True)
    assert port["launches"] > eager["launches"] > 1
    assert eager["syncs"] == 0
    assert eager["us_p20"] <= eager["us_p50"] <= eager["us_p80"]


def test_a_wrong_backend_gets_fail_and_no_time(bench, capsys):
    def wrong(logits, *args, **kwargs):
        return reference.verify(logits.flip(-1), *args, **kwargs)

    arguments = [*TINY, "--methods", "maximal", "--shapes", "5x60", "--backends"]
    assert bench.main(arguments, extra={"wrong": lambda: wrong}) == 1
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])["rows"][-1]
    assert "FAIL" in out
    assert (row["backend"], row["correct"], row["us_p50"], row["gbps"]) == ("wrong", False, None, None)


def test_documents_are_written_and_compared(bench, capsys, tmp_path):
    arguments = [*TINY, "--methods", "maximal", "--shapes", "5x60", "--backends"]
    bench.main([*arguments, "--json", str(tmp_path / "old.json")])
    assert json.loads((tmp_path / "old.json").read_text()) == last_line(capsys)
    bench.main([*arguments, "--compare", str(tmp_path / "old.json")])
    assert "eager maximal B1 W5 V60 bf16: " in capsys.readouterr().out


def test_the_least_bytes_of_exact_match_are_one_reading_of_the_logits(bench, capsys):
    bench.main([*TINY, "--methods", "exact", "--shapes", "5x60", "--backends", "--batch-sizes", "2", "--dtype", "fp32"])
    assert last_line(capsys)["rows"][0]["min_bytes"] == 2 * 2 * 5 * 60 * 4  # pair, batch, window, vocabulary, float32


@pytest.mark.skipif(not native.available(), reason="sjd_engine._C is not built")
def test_the_fit_over_shapes_is_of_the_compiled_backend(bench, capsys):
    arguments = [*TINY, "--methods", "maximal", "--shapes", "3x64", "4x128", "5x256", "--backends", "c++"]
    assert bench.main(arguments) == 0
    document = last_line(capsys)
    assert set(document["fit"]) == {"us_per_million", "intercept_us", "r2"}
    assert [row["launches"] for row in document["rows"] if row["backend"] == "c++"] == [1, 1, 1]


def test_operators_that_only_make_views_are_not_launches(bench):
    x = torch.ones(4, 4)
    with bench.CountOperators() as operators:
        (x.view(16)[:8] + 1).sum().item()
    assert (operators.launches, operators.syncs) == (2, 1)


@pytest.mark.skipif(not native.available(), reason="sjd_engine._C is not built")
class TestPagedCache:
    SHAPES = ("--lengths", "5", "9", "--windows", "3", "--sequences", "2", "--layers", "2")
    TINY = ("--op", "kv", *SHAPES, "--passes", "1", "--peak-gbps", "10")

    @pytest.fixture(autouse=True)
    def no_waiting(self, bench, monkeypatch):
        monkeypatch.setattr(bench.kv_module(), "LEAST_SECONDS", 0.0)

    def test_every_comparison_is_checked_and_timed(self, bench, capsys):
        assert bench.main(self.TINY) == 0
        document = last_line(capsys)
        assert [(row["length"], row["rejected"]) for row in document["rollback"]] == [(5, 3), (9, 3)]
        assert {row["what"] for row in document["rows"]} == {"rollback", "rollback + append", "append", "attention"}
        assert {row["dtype"] for row in document["rows"]} == {"fp32", "bf16"}
        assert all(row["ratio"] > 0 for row in document["rows"])

    def test_a_wrong_result_gets_fail_and_no_time(self, bench, capsys, monkeypatch):
        attend = native.window_attention
        monkeypatch.setattr(native, "window_attention", lambda *args, **words: attend(*args, **words) + 0.1)
        assert bench.main([*self.TINY, "--dtype", "fp32"]) == 1
        out = capsys.readouterr().out
        assert "FAIL" in out
        rows = json.loads(out.splitlines()[-1])["rows"]
        assert {row["us"] for row in rows if row["what"] == "attention"} == {None}
        assert None not in {row["us"] for row in rows if row["what"] != "attention"}
