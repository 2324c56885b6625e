"""VQGAN and MoVQ: equal to transformers' classes where there are any, and else to the formulas, in every layout."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sjd_engine import CheckpointError
from sjd_engine.models.detokenizers.conv import Attention, ConvConfig
from sjd_engine.models.detokenizers.fsq import FSQConfig, FSQDecoder
from sjd_engine.models.detokenizers.movq import MoVQDecoder
from sjd_engine.models.detokenizers.vqgan import VQGANDecoder

ORIGIN = Path("checkpoint")
SIZES = {  # ch, multipliers, latent channels, codes, dimensions of a code, whether the coarsest level has attention
    "chameleon": (32, (1, 1, 2), 40, 24, 40, False),
    "vq16": (32, (1, 1, 2, 2, 4), 16, 24, 8, True),
    "vq8": (32, (1, 2, 2, 4), 16, 24, 8, True),
}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights at which no part is invisible: norms are off one, biases off zero."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        return noise.abs() + 0.5
    if "codebook" in name or "embedding" in name:
        return noise
    if len(shape) == 1:
        return noise * 0.1 if name.endswith(("bias", "running_mean")) else 1 + 0.2 * noise
    scale = 0.3 if "conv_out" in name else 1.0  # an image that is mostly inside [-1, 1]
    return scale * noise / math.sqrt(math.prod(shape[1:]))


def shapes(family: str, ch: int, mult: tuple[int, ...], z: int, codes: int, dim: int, attention: bool):
    """Every tensor of an official checkpoint's decoder and its shape, and a few of the encoder."""
    llamagen, out = family != "chameleon", {}

    def conv(name, n_in, n_out, kernel):
        out[f"{name}.weight"], out[f"{name}.bias"] = (n_out, n_in, kernel, kernel), (n_out,)

    def norm(name, n):
        out[f"{name}.weight"], out[f"{name}.bias"] = (n,), (n,)

    def block(name, n_in, n_out):
        norm(f"{name}.norm1", n_in), conv(f"{name}.conv1", n_in, n_out, 3)
        norm(f"{name}.norm2", n_out), conv(f"{name}.conv2", n_out, n_out, 3)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attn(name, n):
        norm(f"{name}.norm", n)
        for projection in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{projection}", n, n, 1)

    channels = ch * mult[-1]
    out["quantize.embedding.weight"] = (codes, dim)
    conv("quant_conv", z, dim, 1), conv("post_quant_conv", dim, z, 1)
    conv("encoder.conv_in", 3, ch, 3), conv("decoder.conv_in", z, channels, 3)
    mid = ("0", "1", "2") if llamagen else ("block_1", "attn_1", "block_2")
    block(f"decoder.mid.{mid[0]}", channels, channels)
    attn(f"decoder.mid.{mid[1]}", channels)
    block(f"decoder.mid.{mid[2]}", channels, channels)
    for i, level in enumerate(reversed(range(len(mult)))):
        up = f"decoder.conv_blocks.{i}" if llamagen else f"decoder.up.{level}"
        for j in range(3):
            block(f"{up}.{'res' if llamagen else 'block'}.{j}", channels, ch * mult[level])
            channels = ch * mult[level]
            if attention and i == 0:
                attn(f"{up}.attn.{j}", channels)
        if level:
            conv(f"{up}.upsample.conv", channels, channels, 3)
    norm("decoder.norm_out", channels), conv("decoder.conv_out", channels, 3, 3)
    out["quantize.codebook_used" if llamagen else "loss.discriminator.main.0.weight"] = (7,)
    return out


def checkpoint(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, generator) for name, shape in shapes(family, *SIZES[family]).items()}


def reference(t: dict[str, torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
    """The decoder of an official checkpoint from its formulas, one operation at a time."""
    llamagen = "decoder.conv_blocks.0.res.0.norm1.weight" in t

    def conv(name, x):
        weight, bias = t[f"{name}.weight"], t[f"{name}.bias"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(name, x):
        groups = x.reshape(x.shape[0], 32, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, correction=0, keepdim=True)
        x = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        return x * t[f"{name}.weight"].view(1, -1, 1, 1) + t[f"{name}.bias"].view(1, -1, 1, 1)

    def swish(x):
        return x / (1 + torch.exp(-x))

    def block(name, x):
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in t else x)

    def attn(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{projection}", h).flatten(2) for projection in "qkv")
        weights = (torch.einsum("nci,ncj->nij", q, k) / math.sqrt(x.shape[1])).softmax(-1)
        return x + conv(f"{name}.proj_out", torch.einsum("nij,ncj->nci", weights, v).view_as(x))

    vectors = t["quantize.embedding.weight"]
    if llamagen:
        vectors = vectors / vectors.pow(2).sum(-1, keepdim=True).sqrt()
    x = conv("decoder.conv_in", conv("post_quant_conv", vectors[codes].permute(0, 3, 1, 2)))
    for step, layer in zip((block, attn, block), "012" if llamagen else ("block_1", "attn_1", "block_2"), strict=True):
        x = step(f"decoder.mid.{layer}", x)
    levels = len(
        {re.match(r"decoder\.(conv_blocks|up)\.\d+", name)[0] for name in t if "norm1" in name and "mid" not in name}
    )
    for i in range(levels):
        up = f"decoder.conv_blocks.{i}" if llamagen else f"decoder.up.{levels - 1 - i}"
        for j in range(3):
            x = block(f"{up}.{'res' if llamagen else 'block'}.{j}", x)
            if f"{up}.attn.{j}.q.weight" in t:
                x = attn(f"{up}.attn.{j}", x)
        if f"{up}.upsample.conv.weight" in t:
            x = conv(f"{up}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("decoder.conv_out", swish(norm("decoder.norm_out", x)))


def grid(codes: int, rows: int = 3, cols: int = 5) -> torch.Tensor:
    return torch.randint(0, codes, (2, rows, cols), generator=torch.Generator().manual_seed(1))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = random_tensor(name, tuple(tensor.shape), generator)
    return model.eval()


def close(image: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SIZES)
class TestVQGANFromOfficialCheckpoints:
    def test_equals_the_formulas(self, family):
        tensors = checkpoint(family)
        decoder = VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=family != "chameleon")
        codes = grid(24)
        with torch.inference_mode():
            expected = reference({name: t.double() for name, t in tensors.items()}, codes).float()
            close(decoder.decode(codes), expected)
        image = decoder(codes)
        assert image.shape == (2, 3, 3 * decoder.patch_size, 5 * decoder.patch_size)
        close(image, expected.clamp(-1, 1))

    def test_every_tensor_is_used_once(self, family):
        tensors = checkpoint(family)
        loaded = VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=False).state_dict()
        wanted = [t for name, t in tensors.items() if not name.startswith(("encoder", "quant_conv", "loss"))]
        wanted = [t for t in wanted if t.shape != (7,)]
        assert sorted(t.sum().item() for t in loaded.values()) == sorted(t.sum().item() for t in wanted)

    @pytest.mark.parametrize("prefix", ["gen_vision_model.", "model.vqmodel."])
    def test_a_prefix_changes_nothing(self, family, prefix):
        tensors = checkpoint(family)
        plain = VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=True).state_dict()
        prefixed = {prefix + name: tensor for name, tensor in tensors.items()}
        for name, tensor in VQGANDecoder.from_tensors(prefixed, ORIGIN, l2_norm=True).state_dict().items():
            assert torch.equal(tensor, plain[name])

    def test_bfloat16_is_near(self, family):
        tensors = checkpoint(family)
        codes, l2_norm = grid(24), family != "chameleon"
        exact = VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=l2_norm)(codes)
        rounded = VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=l2_norm, dtype=torch.bfloat16)(codes)
        assert rounded.dtype == torch.float32
        assert (rounded - exact).abs().mean() < 0.02


@pytest.fixture(scope="module")
def janus():
    pytest.importorskip("transformers")
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=24, latent_channels=16, base_channels=32, channel_multiplier=[1, 1, 2],
        num_res_blocks=2, num_patches=4,
    )  # fmt: skip
    return randomise(JanusVQVAE(config))


class TestVQGANAgainstTransformers:
    def test_equals_janus(self, janus):
        tensors = {f"model.vqmodel.{name}": tensor for name, tensor in janus.state_dict().items()}
        decoder = VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=True, config=janus.config.to_dict())
        codes = grid(24, 4, 4)
        with torch.inference_mode():
            close(decoder.decode(codes), janus.decode(codes.flatten(1)))

    def test_the_official_layout_is_the_same_network(self, janus):
        """The names of deepseek-ai's checkpoints and those of their conversion."""
        official = {}
        for name, tensor in janus.state_dict().items():
            name = re.sub(r"^decoder\.up\.(\d)\.block", r"decoder.conv_blocks.\1.res", name)
            name = re.sub(r"^decoder\.up\.", "decoder.conv_blocks.", name)
            for i, layer in enumerate(("block_1", "attn_1", "block_2")):
                name = name.replace(f"decoder.mid.{layer}", f"decoder.mid.{i}")
            official[f"gen_vision_model.{name}"] = tensor
        ours = VQGANDecoder.from_tensors(janus.state_dict(), ORIGIN, l2_norm=True).state_dict()
        for name, tensor in VQGANDecoder.from_tensors(official, ORIGIN, l2_norm=True).state_dict().items():
            assert torch.equal(tensor, ours[name])


@pytest.fixture(scope="module")
def emu3():
    pytest.importorskip("transformers")
    from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

    config = Emu3VQVAEConfig(
        codebook_size=24, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 2, 2],
        num_res_blocks=2, attn_resolutions=[2], hidden_size=64,
    )  # fmt: skip
    return randomise(Emu3VQVAE(config))


class TestMoVQ:
    @staticmethod
    def official(emu3):
        """The names of BAAI's checkpoints."""
        tensors = {}
        for name, tensor in emu3.state_dict().items():
            for old, new in (
                ("middle_block.attn_norm", "mid.attn_1.norm"),
                ("middle_block", "mid"),
                ("up_block.up", "up"),
                ("down_block.down", "down"),
                ("out_proj", "proj_out"),
            ):
                name = name.replace(old, new)
            name = re.sub(r"\.(q|k|v)_proj\.", r".\1.", name)
            name = re.sub(r"\.attn_norms\.(\d)\.", r".attn.\1.norm.", name)
            projection = re.search(r"\.(q|k|v|proj_out)\.weight$", name)
            tensors[name] = tensor[..., None, None] if projection else tensor
        return tensors

    def test_equals_emu3(self, emu3):
        tensors = {f"model.vqmodel.{name}": tensor for name, tensor in emu3.state_dict().items()}
        decoder = MoVQDecoder.from_tensors(tensors, ORIGIN, config=emu3.config.to_dict())
        codes = grid(24)
        with torch.inference_mode():
            close(decoder.decode(codes), emu3.decode(codes))

    def test_the_official_layout_is_the_same_network(self, emu3):
        ours = MoVQDecoder.from_tensors(emu3.state_dict(), ORIGIN).state_dict()
        loaded = MoVQDecoder.from_tensors(self.official(emu3), ORIGIN).state_dict()
        assert loaded.keys() == ours.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, ours[name])

    def test_every_tensor_is_used_once(self, emu3):
        """One tensor each, save that a batch norm's four become two."""
        tensors = [name for name in emu3.state_dict() if not name.startswith(("encoder.", "quant_conv."))]
        folded = [name for name in tensors if "running_" in name or "num_batches_tracked" in name]
        assert len(MoVQDecoder.from_tensors(emu3.state_dict(), ORIGIN).state_dict()) == len(tensors) - len(folded)

    def test_bfloat16_is_near(self, emu3):
        codes = grid(24)
        exact = MoVQDecoder.from_tensors(emu3.state_dict(), ORIGIN)(codes)
        rounded = MoVQDecoder.from_tensors(emu3.state_dict(), ORIGIN, dtype=torch.bfloat16)(codes)
        assert (rounded - exact).abs().mean() < 0.03

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda t: t.pop("decoder.time_res_stack.0.norm1.running_mean"), r"missing time_res_stack.*running_mean"),
            (lambda t: t.pop("decoder.time_res_stack.0.norm1.running_var"), r"missing time_res_stack.*running_var"),
            (lambda t: t.pop("decoder.up_block.up.2.attn_norms.0.conv_y.weight"), r"missing decoder\.up\.2\.attn\.0"),
            (lambda t: t.update({"decoder.extra.weight": torch.zeros(3)}), r"unknown decoder\.extra\.weight"),
            (lambda t: t.update({"post_quant_conv.conv.weight": torch.zeros(4, 4, 2, 1, 1)}), "post_quant_conv.*expec"),
            (lambda t: t.update({"decoder.time_res_stack.1.norm2.weight": torch.ones(5)}), "tensors of one length"),
        ],
        ids=["missing-mean", "missing-variance", "missing-norm", "unknown", "taps", "misshapen"],
    )  # fmt: skip
    def test_damaged_checkpoints_are_refused(self, emu3, damage, message):
        tensors = dict(emu3.state_dict())
        damage(tensors)
        with pytest.raises(CheckpointError, match=message):
            MoVQDecoder.from_tensors(tensors, ORIGIN)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("quantize.embedding.weight"), "expected one quantize.embedding.weight, got 0"),
        (lambda t: t.pop("decoder.conv_in.weight"), r"missing decoder\.conv_in\.weight"),
        (lambda t: t.pop("decoder.mid.attn_1.k.bias"), r"missing decoder\.mid\.attn_1\.k\.bias \[64\]"),
        (lambda t: t.pop("decoder.up.2.upsample.conv.weight"), r"missing decoder\.up\.2\.upsample"),
        (lambda t: t.update({"decoder.up.1.gate": torch.zeros(1)}), r"unknown decoder\.up\.1\.gate"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(1)}), r"unknown lm_head\.weight"),
        (lambda t: t.update({"decoder.conv_out.bias": torch.zeros(4)}), r"conv_out\.bias: expected \[3\], got \[4\]"),
        (lambda t: t.update({"decoder.conv_in.weight": torch.zeros(64)}), r"expected 4 dimensions, got \[64\]"),
        (lambda t: t.update({"decoder.mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)}), r"expected \[64, 64\], got"),
        (lambda t: t.update({"decoder.mid.0.conv1.bias": torch.zeros(64)}), r"two tensors for decoder\.mid\.block_1"),
        (lambda t: t.update({"a.quantize.embedding.weight": torch.zeros(2, 2)}), "expected one .*, got 2"),
        (
            lambda t: t.update({f"vq.{n}": t[n] for n in [*t]}) or t.pop("quantize.embedding.weight"),
            r"with and without the prefix vq\.",
        ),
        (lambda t: t.update({"decoder.up.0.block.0.conv1.weight": torch.zeros(33, 32, 3, 3)}), "multiples of 32"),
    ],
    ids=lambda value: None if callable(value) else value,
)
def test_damaged_checkpoints_are_refused(damage, message):
    tensors = checkpoint("chameleon")
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=False)


@pytest.mark.parametrize(
    "lie",
    [
        {"num_embeddings": 16384},
        {"embed_dim": 8},
        {"latent_channels": 4},
        {"num_res_blocks": 3},
        {"ch": 32, "ch_mult": [1, 2, 4]},
        {"base_channels": None, "channel_multiplier": [1, 1, 2]},
    ],
    ids=str,
)
def test_a_config_of_other_sizes_is_refused(lie):
    truth = {"num_embeddings": 24, "embed_dim": 40, "latent_channels": 40, "num_res_blocks": 2, "resolution": 512}
    VQGANDecoder.from_tensors(checkpoint("chameleon"), ORIGIN, l2_norm=False, config=truth)
    with pytest.raises(CheckpointError, match=f"expected {next(iter(lie))}"):
        VQGANDecoder.from_tensors(checkpoint("chameleon"), ORIGIN, l2_norm=False, config=truth | lie)


@pytest.fixture(scope="module")
def decoder():
    return VQGANDecoder.from_tensors(checkpoint("chameleon"), ORIGIN, l2_norm=False)


class TestCodes:
    @pytest.mark.parametrize("code", [-1, 24])
    def test_outside_the_codebook_are_refused(self, decoder, code):
        codes = grid(24)
        codes[0, 0, 0] = code
        with pytest.raises(ValueError, match=r"VQGANDecoder: codes must be in 0\.\.23, got"):
            decoder(codes)

    def test_outside_the_lattice_are_refused(self):
        with pytest.raises(ValueError, match=r"FSQDecoder: codes must be in 0\.\.999, got 1000\.\.1000"):
            FSQDecoder(FSQConfig(channels=16))(torch.full((1, 2, 2), 1000))

    @pytest.mark.parametrize("codes", [torch.zeros(3, 5, dtype=torch.int64), torch.zeros(1, 3, 5, dtype=torch.int32)])
    def test_of_another_shape_or_type_are_refused(self, decoder, codes):
        with pytest.raises(ValueError, match=r"codes must be \[N, rows, cols\] int64, got"):
            decoder(codes)

    def test_none_are_refused(self, decoder):
        with pytest.raises(ValueError, match="at least one code"):
            decoder(torch.zeros(0, 3, 5, dtype=torch.int64))

    def test_images_decoded_apart_are_the_images_decoded_together(self, decoder, monkeypatch):
        codes = grid(24)
        together = decoder(codes)
        monkeypatch.setattr("sjd_engine.models.detokenizers.base.MAX_PIXELS", 1)
        torch.testing.assert_close(decoder(codes), together)


def largest_allocation(run) -> int:
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max(event.cpu_memory_usage for event in profile.events())


def test_attention_holds_no_score_matrix():
    """At 64x64 positions the scores alone are 64 MiB, the input is half of one."""
    attention, x = Attention(32, ConvConfig(8, (32,), 1)), torch.randn(1, 32, 64, 64)
    rows = x.flatten(2)
    assert largest_allocation(lambda: attention(x)) < 4 << 20 < largest_allocation(lambda: rows.mT @ rows)


PUBLISHED = {
    "chameleon": (128, (1, 1, 2, 2, 4), 256, 8192, 256, False),
    "vq16": (128, (1, 1, 2, 2, 4), 256, 16384, 8, True),
    "vq8": (128, (1, 2, 2, 4), 256, 16384, 8, True),
}


@pytest.mark.parametrize(("family", "millions"), [("chameleon", 39.3), ("vq16", 42.4), ("vq8", 41.4)])
def test_the_published_sizes_fit(family, millions):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes(family, *PUBLISHED[family]).items()}
    decoder = VQGANDecoder.from_tensors(tensors, ORIGIN, l2_norm=family != "chameleon")
    assert round(sum(p.numel() for p in decoder.decoder.parameters()) / 1e6, 1) == millions
    assert decoder.patch_size == (8 if family == "vq8" else 16)


def test_the_published_size_of_emu3_fits():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        emu3 = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig())
    decoder = MoVQDecoder.from_tensors(emu3.state_dict(), ORIGIN, config=emu3.config.to_dict())
    assert round(sum(p.numel() for p in decoder.decoder.parameters()) / 1e6, 1) == 161.1
    assert decoder.patch_size == 8
