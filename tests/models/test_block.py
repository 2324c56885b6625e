"""The block against transformers' own models, on the same weights."""

import pytest
import torch
from torch import Tensor

from sjd_engine.models import checkpoint_folder
from sjd_engine.models.block import BlockConfig, Transformer
from sjd_engine.models.weights import load_qwen2, read_json

transformers = pytest.importorskip("transformers")


def randomise(model: torch.nn.Module) -> None:
    """Norms around 1, biases and matrices with spread: defaults of 1 and 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in name and "bias" not in name else 0.1 * noise


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """(folder, config) of a tiny random Qwen2 checkpoint with grouped queries, biases and an untied head."""
    config = transformers.Qwen2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=1e4,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2ForCausalLM(config)
    randomise(model)
    folder = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(folder)
    return folder, read_json(folder / "config.json")


def full_logits(model: Transformer, ids: Tensor) -> Tensor:
    cache = model.new_cache(len(ids), ids.shape[1])
    return model.logits(model(model.embed(ids), cache))


def hf_logits(folder, ids: Tensor, dtype: torch.dtype) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        return model(ids).logits.float()


class TestQwen2:
    def test_float32_logits_equal_transformers(self, qwen2):
        folder, config = qwen2
        ids = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(1))
        ours = load_qwen2(folder, config, first_code=50, num_codes=100, dtype=torch.float32)
        expected = hf_logits(folder, ids, torch.float32)[..., 50:150]
        assert (full_logits(ours, ids) - expected).abs().max() <= 1e-5

    def test_bundled_weights_equal_transformers(self):
        folder = checkpoint_folder("emoji")
        config = read_json(folder / "config.json")
        first, count = config["image_generation"]["first_code"], config["vocab_size"] - 3072
        ids = torch.randint(first, first + count, (2, 256), generator=torch.Generator().manual_seed(1))
        exact = hf_logits(folder, ids, torch.float32)[..., first:]
        ours = load_qwen2(folder, config, first_code=first, num_codes=count, dtype=torch.float32)
        assert (full_logits(ours, ids) - exact).abs().max() <= 1e-5 * exact.abs().max()

    def test_bfloat16_error_is_within_twice_that_of_transformers(self):
        folder = checkpoint_folder("emoji")
        config = read_json(folder / "config.json")
        first, count = config["image_generation"]["first_code"], config["vocab_size"] - 3072
        ids = torch.randint(first, first + count, (2, 256), generator=torch.Generator().manual_seed(1))
        exact = hf_logits(folder, ids, torch.float32)[..., first:]
        theirs = (hf_logits(folder, ids, torch.bfloat16)[..., first:] - exact).abs()
        ours = load_qwen2(folder, config, first_code=first, num_codes=count, dtype=torch.bfloat16)
        errors = (full_logits(ours, ids) - exact).abs()
        assert errors.max() <= 2 * theirs.max()
        assert errors.mean() <= 2 * theirs.mean()

    def test_windows_with_rollback_equal_one_full_pass(self, qwen2):
        """Ragged lengths, random chunks, rejected tokens that are overwritten."""
        folder, config = qwen2
        model = load_qwen2(folder, config, first_code=0, num_codes=200, dtype=torch.float32)
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(0, 200, (3, 48), generator=generator)
        expected = full_logits(model, ids)
        cache = model.new_cache(3, 48 + 16)
        lengths = torch.zeros(3, dtype=torch.int64)
        got = torch.zeros_like(expected)
        while (lengths < 48).any():
            width = int(torch.randint(1, 9, (), generator=generator))
            window = torch.randint(0, 200, (3, width), generator=generator)  # garbage past the kept tokens
            kept = torch.randint(1, width + 1, (3,), generator=generator).minimum(48 - lengths)
            for row in range(3):
                window[row, : kept[row]] = ids[row, lengths[row] : lengths[row] + kept[row]]
            logits = model.logits(model(model.embed(window), cache))
            for row in range(3):
                got[row, lengths[row] : lengths[row] + kept[row]] = logits[row, : kept[row]]
            lengths = lengths + kept
            cache.rollback(lengths)
        assert (got - expected).abs().max() <= 2e-5

    def test_a_full_cache_is_an_error(self, qwen2):
        folder, config = qwen2
        model = load_qwen2(folder, config, first_code=0, num_codes=200, dtype=torch.float32)
        with pytest.raises(ValueError, match="exceed the capacity of 4"):
            model(model.embed(torch.zeros(1, 5, dtype=torch.int64)), model.new_cache(1, 4))


@pytest.mark.parametrize("swin", [False, True], ids=["pre", "swin"])
def test_chameleon_switches_equal_transformers(swin):
    """QK-norm with an affine per (head, dim), and both norm styles."""
    config = transformers.ChameleonConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if swin else 4,
        max_position_embeddings=64,
        swin_norm=swin,
        vocabulary_map={"<image>": 70, **{f"IMGIMG{chr(65 + i // 26)}{chr(65 + i % 26)}Z": 4 + i for i in range(64)}},
        vq_config={"base_channels": 32, "channel_multiplier": [1, 2], "embed_dim": 8, "num_embeddings": 64},
    )
    theirs = transformers.ChameleonModel(config).eval()
    randomise(theirs)
    head = 0.1 * torch.randn(160, 64, generator=torch.Generator().manual_seed(4))
    block = BlockConfig(
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=config.num_key_value_heads,
        head_dim=16,
        max_positions=64,
        rope_theta=1e4,
        norm_eps=config.rms_norm_eps,
        norm_style="swin" if swin else "pre",
        qk_norm=True,
    )
    ours = Transformer(block, 160, 160)
    source = dict(theirs.named_parameters())
    state = {"embedding": source["embed_tokens.weight"], "norm": source["norm.weight"], "head": head}
    for i in range(2):
        layer = f"layers.{i}"
        attention = f"{layer}.self_attn"
        norms = [
            torch.cat((source[f"{attention}.q_norm.{part}"], source[f"{attention}.k_norm.{part}"]))
            for part in ("weight", "bias")
        ]
        state |= {
            f"blocks.{i}.norm1": source[f"{layer}.input_layernorm.weight"],
            f"blocks.{i}.norm2": source[f"{layer}.post_attention_layernorm.weight"],
            f"blocks.{i}.wqkv": torch.cat([source[f"{attention}.{x}_proj.weight"] for x in "qkv"]),
            f"blocks.{i}.wo": source[f"{attention}.o_proj.weight"],
            f"blocks.{i}.w_gate_up": torch.cat([source[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up")]),
            f"blocks.{i}.w_down": source[f"{layer}.mlp.down_proj.weight"],
            f"blocks.{i}.qk_norm": torch.stack(norms),
        }
    ours.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    ids = torch.randint(71, 160, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(ids).last_hidden_state @ head.T
    assert (full_logits(ours, ids) - expected).abs().max() <= 1e-5
