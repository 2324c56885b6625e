"""The block against transformers' own models, on the same weights."""

import pytest
import torch
from torch import Tensor

from sjd_engine.models import checkpoint_folder
from sjd_engine.models.block import BlockConfig, Transformer
from sjd_engine.models.checkpoint import Checkpoint
from sjd_engine.models.weights import load_qwen2
from sjd_engine.ops import Tree

transformers = pytest.importorskip("transformers")


def randomise(model: torch.nn.Module) -> None:
    """Norms around 1, biases and matrices with spread: defaults of 1 and 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in name and "bias" not in name else 0.1 * noise


@pytest.fixture(scope="module", params=[{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.5}], ids=str)
def qwen2(request, tmp_path_factory):
    """A tiny random Qwen2 checkpoint with grouped queries, biases and an untied head."""
    config = transformers.Qwen2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e4, **request.param},
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2ForCausalLM(config)
    randomise(model)
    folder = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(folder)
    return Checkpoint(folder)


def load(checkpoint: Checkpoint, first_code: int, num_codes: int, dtype: torch.dtype = torch.float32) -> Transformer:
    device = torch.device("cpu")
    return load_qwen2(checkpoint, first_code=first_code, num_codes=num_codes, device=device, dtype=dtype)


@pytest.fixture(scope="module")
def bundled():
    """(checkpoint, first code, number of codes) of the model that the package brings."""
    checkpoint = Checkpoint(checkpoint_folder("emoji"))
    first = checkpoint.config["image_generation"]["first_code"]
    return checkpoint, first, checkpoint.config["vocab_size"] - 3072


def full_logits(model: Transformer, ids: Tensor) -> Tensor:
    cache = model.new_cache(len(ids), ids.shape[1])
    return model.logits(model(model.embed(ids), cache))


def hf_logits(checkpoint: Checkpoint, ids: Tensor, dtype: torch.dtype) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype)
    with torch.inference_mode():
        return model(ids).logits.float()


class TestQwen2:
    def test_float32_logits_equal_transformers(self, qwen2):
        ids = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(1))
        ours = load(qwen2, 50, 100)
        expected = hf_logits(qwen2, ids, torch.float32)[..., 50:150]
        assert (full_logits(ours, ids) - expected).abs().max() <= 1e-5

    def test_bundled_weights_equal_transformers(self, bundled):
        checkpoint, first, count = bundled
        ids = torch.randint(first, first + count, (2, 256), generator=torch.Generator().manual_seed(1))
        exact = hf_logits(checkpoint, ids, torch.float32)[..., first:]
        ours = load(checkpoint, first, count)
        assert (full_logits(ours, ids) - exact).abs().max() <= 1e-5 * exact.abs().max()

    def test_bfloat16_error_is_within_twice_that_of_transformers(self, bundled):
        checkpoint, first, count = bundled
        ids = torch.randint(first, first + count, (2, 256), generator=torch.Generator().manual_seed(1))
        exact = hf_logits(checkpoint, ids, torch.float32)[..., first:]
        theirs = (hf_logits(checkpoint, ids, torch.bfloat16)[..., first:] - exact).abs()
        ours = load(checkpoint, first, count, torch.bfloat16)
        errors = (full_logits(ours, ids) - exact).abs()
        assert errors.max() <= 2 * theirs.max()
        assert errors.mean() <= 2 * theirs.mean()

    def test_a_full_cache_is_an_error(self, qwen2):
        model = load(qwen2, 0, 200)
        with pytest.raises(ValueError, match="exceed the capacity of 4"):
            model(model.embed(torch.zeros(1, 5, dtype=torch.int64)), model.new_cache(1, 4))


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_windows_with_rollback_equal_one_full_pass(num_kv_heads, page_size):
    """Ragged lengths, random chunks, rejected tokens that are overwritten, poison behind what is valid."""
    config = BlockConfig(
        num_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        unpadded_head_dim=16,
        max_positions=512,
        rope_theta=1e4,
        norm_eps=1e-6,
        qkv_bias=True,
    )
    model = Transformer(config, 200, 50)
    randomise(model)
    length = 300  # more than a page of every size
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 200, (3, length), generator=generator)
        expected = full_logits(model, ids)
        cache = model.new_cache(3, length + 64, page_size=page_size, poison=64)
        lengths = torch.zeros(3, dtype=torch.int64)
        got = torch.zeros_like(expected)
        while (lengths < length).any():
            width = int(torch.randint(1, 65, (), generator=generator))
            window = torch.randint(0, 200, (3, width), generator=generator)  # garbage past the kept tokens
            kept = torch.randint(1, width + 1, (3,), generator=generator).minimum(length - lengths)
            for row in range(3):
                window[row, : kept[row]] = ids[row, lengths[row] : lengths[row] + kept[row]]
            logits = model.logits(model(model.embed(window), cache))
            for row in range(3):
                got[row, lengths[row] : lengths[row] + kept[row]] = logits[row, : kept[row]]
            lengths = lengths + kept
            cache.rollback(lengths)
        assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("page_size", [3, 64])
def test_accepted_paths_of_a_tree_equal_one_full_pass(qwen2, page_size):
    """Path by path to whole sequences: the mask, the positions and the compaction, with poison behind the lengths."""
    model, tree, chain, length = load(qwen2, 0, 200), Tree(3, 3), 4, 40
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 200, (2, length + chain), generator=generator)
    expected = full_logits(model, ids)
    nodes, children = tree.nodes(chain), tree.children(chain)
    layout = {"offsets": tree.offsets(chain), "window_bias": tree.window_bias(chain)}
    cache = model.new_cache(2, length + len(nodes), page_size=page_size, poison=len(nodes))
    got, lengths = torch.zeros_like(expected), torch.zeros(2, dtype=torch.int64)
    while (lengths < length).any():
        window = torch.randint(0, 200, (2, len(nodes)), generator=generator)
        rows, slots = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 2]] * 2)
        for b in range(2):
            window[b, 0] = ids[b, lengths[b]]
            for level in (1, 2):
                slots[b, level - 1] = rows[b, level] = children[rows[b, level - 1], torch.randint(3, ())]
                window[b, rows[b, level]] = ids[b, lengths[b] + level]
        logits = model.logits(model(model.embed(window), cache, **layout))
        for b in range(2):
            got[b, lengths[b] : lengths[b] + 3] = logits[b, rows[b]]
        cache.compact(slots)
        lengths = (lengths + 3).clamp_max(length)
        cache.rollback(lengths)
    assert (got - expected)[:, :length].abs().max() <= 1e-5


def test_a_tree_of_tokens_in_one_pass_equals_its_paths(qwen2):
    """Slots in any order, as long as each has its own offset and sees its ancestors alone."""
    model = load(qwen2, 0, 200)
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    paths = [[0, 1, 2], [0, 3, 4], [0, 3, 5]]  # of a window of six tokens behind the context
    offsets = torch.tensor([0, 1, 2, 1, 2, 2])
    bias = torch.full((6, 6), float("-inf"))
    for path in paths:
        for depth, slot in enumerate(path):
            bias[slot, path[: depth + 1]] = 0
    cache = model.new_cache(2, 12, page_size=4, poison=12)
    model(model.embed(ids[:, :6]), cache)
    cache.rollback(torch.tensor([6, 6]))
    window = model.embed(ids[:, 6:])
    tree = model.logits(model(window, cache, offsets=offsets, window_bias=bias))
    for path in paths:
        expected = full_logits(model, torch.cat((ids[:, :6], ids[:, 6:][:, path]), 1))[:, 6:]
        assert (tree[:, path] - expected).abs().max() <= 1e-5
    by_default = model.logits(model(window, cache))
    spelt_out = model(window, cache, offsets=torch.arange(6), window_bias=torch.full((6, 6), float("-inf")).triu(1))
    assert (by_default - model.logits(spelt_out)).abs().max() <= 1e-5
    assert (by_default - tree).abs().max() > 0.1
