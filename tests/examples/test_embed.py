"""The examples of embedding, run."""

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_a_plain_loop(example, capsys):
    example("embed_pytorch").main()
    exact, maximal = capsys.readouterr().out.splitlines()
    assert exact.endswith("the images of one token a pass")
    for line in (exact, maximal):
        assert max(map(int, line[line.index("[") + 1 : line.index("]")].split(","))) < 48


def test_a_pass_is_one_graph_with_three_kinds_of_ops(example):
    """And it decodes what it decodes without a compiler, window for window."""
    script, graphs = example("embed_ops"), []

    def inspect(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes if "sjd." in str(node.target)])
        return graph

    eager, passes = script.draw()
    compiled, _ = script.draw(backend=inspect)
    assert torch.equal(compiled, eager)
    assert passes < 40
    assert all(graph == ["sjd.append_kv", "sjd.window_attention", "sjd.verify"] for graph in graphs)
    assert len(graphs) <= 2  # with and without the logits of a pass before


def test_transformers_draws_an_image(example, engine, tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "apple.png"
    codes = example("embed_huggingface").main("a red apple", str(path), method="exact", window_size=32, seed=3)
    assert f"{path}: 256 tokens in" in capsys.readouterr().out
    assert path.stat().st_size > 1000
    arguments = {"method": "exact", "window_size": 32, "seed": 3, "output_type": "codes", "progress": False}
    out = engine.generate("a red apple", guidance_scale=2.0, **arguments)
    assert torch.equal(codes, out.token_ids)
