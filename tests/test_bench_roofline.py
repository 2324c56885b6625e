"""bench/roofline.py: its arithmetic, and that it says what is computed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "bench" / "roofline.py"


@pytest.fixture(scope="module")
def roofline():
    spec = importlib.util.spec_from_file_location("bench_roofline", FILE)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def family(roofline, name):
    return next(family for family in roofline.FAMILIES if family.name == name)


@pytest.mark.parametrize(
    ("name", "billions"), [("Anole-7B", 6.51), ("Janus-Pro-1B", 1.27), ("LlamaGen-XL, text", 0.752), ("Emu3-Gen", 7.11)]
)
def test_families_have_the_weights_of_their_size(roofline, name, billions):
    """Of blocks and head, without the embedding, and with the head's image rows alone."""
    found = family(roofline, name)
    assert (found.block.num_layers * found.layer_weights + found.head_weights) / 1e9 == pytest.approx(
        billions, rel=0.01
    )


def test_a_short_pass_takes_the_time_of_reading_the_weights(roofline):
    large, gpu = family(roofline, "Emu3-Gen"), roofline.GPUS[-1]
    needs = roofline.cost(large, 1, 2)
    weights = large.weight_bytes / (1e9 * gpu.gbps)
    launching = 1e-6 * gpu.launch_us * needs.launches
    assert needs.seconds(gpu) - launching == pytest.approx(weights, rel=0.08)  # keys and values, too


def test_products_grow_with_the_window_and_bytes_hardly(roofline):
    large = family(roofline, "Lumina-mGPT-7B")
    one, many = roofline.cost(large, 1, 2), roofline.cost(large, 64, 2)
    assert many.flops / one.flops == pytest.approx(64, rel=0.02)
    assert many.bytes / one.bytes < 1.1
    assert many.launches == one.launches


def test_curves_pass_through_their_points(roofline):
    curve = roofline.Curve("", "", {16: 3.0, 64: 5.0})
    assert [curve.at(w) for w in (1, 4, 16, 32, 64, 128)] == [1, 2, 3, 4, 5, 5]


def test_a_measured_curve_takes_the_place_of_the_stated_one(roofline, tmp_path, capsys):
    rows = [{"method": "maximal", "window": 16, "step_compression": 2.0}]
    path = tmp_path / "window.json"
    path.write_text(json.dumps({"setup": {"model": "m"}, "rows": [*rows, {"method": "maximal", "window": "auto"}]}))
    roofline.main(["--no-cpu", "--images", "1", "--curve", str(path), "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert roofline.LABEL in out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document == json.loads(out.splitlines()[-1])
    assert all(1 < row["maximal on m"]["speed_up"] <= 2 for row in document["computed"])
    with pytest.raises(SystemExit, match="no row of exact"):
        roofline.measured_curve(path, "exact")


def test_the_error_of_the_formula_is_told_for_every_window(roofline, engine_bf16):
    device, rows = roofline.check(engine_bf16, [1], 1)
    assert device.gbps > 0
    assert [row["window"] for row in rows] == list(roofline.CPU_WINDOWS)
    assert all(row["measured_over_computed"] > 0 for row in rows)
