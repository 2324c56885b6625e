"""Cosmos: the collapsed decoder equals the video decoder at one frame, and its archive is read without being run."""

import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from sjd_engine import CheckpointError
from sjd_engine.cli import app
from sjd_engine.models.detokenizers.conv import ConvConfig
from sjd_engine.models.detokenizers.cosmos import CosmosDecoder
from sjd_engine.models.torchscript import read_torchscript

ORIGIN = Path("decoder.jit")
LEVELS = (8, 8, 8, 5, 5, 5)


class Conv(nn.Module):
    """A convolution over video: earlier than the first frame stands the first frame; around the image stands zero."""

    def __init__(self, n_in, n_out, time=1, space=1):
        super().__init__()
        self.conv3d = nn.Conv3d(n_in, n_out, (time, space, space))

    def forward(self, x):
        time, space, _ = self.conv3d.kernel_size
        x = torch.cat([x[:, :, :1]] * (time - 1) + [x], 2)
        return self.conv3d(F.pad(x, (space // 2,) * 4))


class Norm(nn.Module):
    """Over all channels and positions of each frame."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x):
        mean, variance = x.mean((1, 3, 4), keepdim=True), x.var((1, 3, 4), correction=0, keepdim=True)
        scale, shift = (p.view(1, -1, 1, 1, 1) for p in (self.norm.weight, self.norm.bias))
        return (x - mean) / (variance + 1e-6).sqrt() * scale + shift


def factorised(n_in, n_out):
    return nn.Sequential(Conv(n_in, n_out, space=3), Conv(n_out, n_out, time=3))


class Block(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = Norm(n_in), factorised(n_in, n_out)
        self.norm2, self.conv2 = Norm(n_out), factorised(n_out, n_out)
        self.nin_shortcut = Conv(n_in, n_out) if n_in != n_out else nn.Identity()

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.nin_shortcut(x) + h


class SpaceAttention(nn.Module):
    """Every position of a frame to all of that frame."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.q, self.k = Norm(channels), Conv(channels, channels), Conv(channels, channels)
        self.v, self.proj_out = Conv(channels, channels), Conv(channels, channels)

    def forward(self, x):
        n, c, t, h, w = x.shape
        q, k, v = (p(self.norm(x)).permute(0, 2, 3, 4, 1).reshape(n, t, h * w, c) for p in (self.q, self.k, self.v))
        out = (q @ k.mT / math.sqrt(c)).softmax(-1) @ v
        return x + self.proj_out(out.view(n, t, h, w, c).permute(0, 4, 1, 2, 3))


class TimeAttention(SpaceAttention):
    """Every position to itself in the frames up to its own."""

    def forward(self, x):
        n, c, t, h, w = x.shape
        q, k, v = (p(self.norm(x)).permute(0, 3, 4, 2, 1).reshape(n * h * w, t, c) for p in (self.q, self.k, self.v))
        later = torch.ones(t, t).triu(1).bool()
        out = (q @ k.mT / math.sqrt(c)).masked_fill(later, -math.inf).softmax(-1) @ v
        return x + self.proj_out(out.view(n, h, w, t, c).permute(0, 4, 3, 1, 2))


def attention(channels):
    return nn.Sequential(SpaceAttention(channels), TimeAttention(channels))


class Upsample(nn.Module):
    """Doubles space, and time from the second frame on."""

    def __init__(self, channels, temporal):
        super().__init__()
        self.temporal = temporal
        self.conv1, self.conv2 = Conv(channels, channels, time=3), Conv(channels, channels, space=3)
        self.conv3 = Conv(channels, channels)

    def forward(self, x):
        if self.temporal:
            x = x.repeat_interleave(2, 2)[:, :, 1:]
            x = x + self.conv1(x)
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return self.conv3(x + self.conv2(x))


class Decoder(nn.Module):
    def __init__(self, channels, mult, z):
        super().__init__()
        n = channels * mult[-1]
        self.conv_in = factorised(z, n)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Block(n, n), attention(n), Block(n, n)
        levels = []
        for level in reversed(range(len(mult))):
            up = nn.Module()
            up.block = nn.ModuleList(
                Block(n if i == 0 else channels * mult[level], channels * mult[level]) for i in range(3)
            )
            n = channels * mult[level]
            if level:
                up.upsample = Upsample(n, temporal=level != len(mult) - 1)
            levels.insert(0, up)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = Norm(n), factorised(n, 3 * 64)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level, up in reversed(list(enumerate(self.up))):
            for block in up.block:
                x = block(x)
            if level:
                x = up.upsample(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        for _ in range(2):
            x = inverse_haar(x)
        return x[:, :, 3:]


def inverse_haar(x):
    """Eight bands, low or high over time, rows and columns, to doubled time, rows and columns.

    Along one axis (low + high, low - high) / sqrt(2), and sqrt(8) for all three.
    """
    bands = list(x.chunk(8, 1))
    for axis in (4, 3, 2):
        bands = [
            torch.stack([low + high, low - high], axis + 1).flatten(axis, axis + 1) / math.sqrt(2)
            for low, high in zip(bands[::2], bands[1::2], strict=True)
        ]
    return bands[0] * math.sqrt(8)


class InverseQuantizer(nn.Module):
    """Codes to values; keeps constants in buffers, as the public archive does."""

    def __init__(self):
        super().__init__()
        self.quantizer = nn.Module()
        self.quantizer.register_buffer("_levels", torch.tensor(LEVELS, dtype=torch.int32), persistent=False)
        self.quantizer.register_buffer("_basis", torch.tensor([1, 8, 64, 512, 2560, 12800], dtype=torch.int32))

    def forward(self, codes):
        digits = codes[..., None] // self.quantizer._basis % self.quantizer._levels
        half = self.quantizer._levels // 2
        return ((digits - half) / half).permute(0, 4, 1, 2, 3)


class Cosmos(nn.Sequential):
    """[N, 1, rows, cols] codes -> [N, 3, 1, 16 rows, 16 cols], with the names of the public decoder.jit."""

    def __init__(self, channels=16, mult=(1, 1, 2), z=16):
        super().__init__()
        self.inv_quant = InverseQuantizer()
        self.post_quant_conv = Conv(6, z)
        self.decoder = Decoder(channels, mult, z)


@pytest.fixture(scope="module")
def cosmos():
    model, generator = Cosmos(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = noise * 0.1 if name.endswith("bias") else 1 + 0.2 * noise
        else:
            parameter.data = 0.7 * noise / math.sqrt(math.prod(parameter.shape[1:]))
    return model.requires_grad_(False)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def archive(cosmos, tmp_path_factory):
    """The model as TorchScript."""
    path = tmp_path_factory.mktemp("cosmos") / "decoder.jit"
    torch.jit.trace(cosmos, torch.zeros(1, 1, 2, 3, dtype=torch.int64)).save(str(path))
    return path


def grid():
    return torch.randint(0, 64000, (2, 3, 5), generator=torch.Generator().manual_seed(1))


def expected(cosmos):
    with torch.inference_mode():
        return cosmos(grid()[:, None])[:, :, 0]


def test_equals_the_video_decoder_at_one_frame(cosmos):
    decoder = CosmosDecoder.from_tensors(cosmos.state_dict(), ORIGIN)
    image = expected(cosmos)
    assert image.shape == (2, 3, 48, 80)
    assert image.std() > 0.1
    with torch.inference_mode():
        torch.testing.assert_close(decoder.decode(grid()), image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder(grid()), image.clamp(-1, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        "post_quant_conv.conv3d.weight",
        "decoder.conv_in.1.conv3d.weight",
        "decoder.mid.attn_1.0.q.conv3d.weight",
        "decoder.mid.attn_1.1.norm.norm.bias",
        "decoder.mid.attn_1.1.v.conv3d.bias",
        "decoder.mid.attn_1.1.proj_out.conv3d.weight",
        "decoder.up.1.upsample.conv1.conv3d.weight",
        "decoder.up.2.upsample.conv2.conv3d.bias",
        "decoder.up.2.upsample.conv3.conv3d.weight",
        "decoder.up.0.block.2.conv2.1.conv3d.bias",
        "decoder.conv_out.1.conv3d.weight",
    ],
)
def test_every_part_moves_the_image(cosmos, part):
    tensors = dict(cosmos.state_dict())
    image = CosmosDecoder.from_tensors(tensors, ORIGIN)(grid())
    assert (
        CosmosDecoder.from_tensors(tensors | {part: tensors[part] * 1.5}, ORIGIN)(grid()) - image
    ).abs().max() > 1e-3


def test_bfloat16_is_near(cosmos):
    tensors = dict(cosmos.state_dict())
    exact = CosmosDecoder.from_tensors(tensors, ORIGIN)(grid())
    assert (CosmosDecoder.from_tensors(tensors, ORIGIN, dtype=torch.bfloat16)(grid()) - exact).abs().mean() < 0.03


def test_codes_outside_the_lattice_are_refused(cosmos):
    with pytest.raises(ValueError, match=r"CosmosDecoder: codes must be in 0\.\.63999, got 64000"):
        CosmosDecoder.from_tensors(dict(cosmos.state_dict()), ORIGIN)(torch.full((1, 2, 2), 64000))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("decoder.conv_out.1.conv3d.weight"), r"missing decoder\.conv_out\.1\.conv3d\.weight"),
        (lambda t: t.pop("decoder.up.2.upsample.conv3.conv3d.bias"), r"missing decoder\.up\.2\.upsample\.conv3"),
        (lambda t: t.pop("decoder.up.1.block.0.norm2.norm.bias"), r"missing decoder\.up\.1\.block\.0\.norm2"),
        (lambda t: t.update({"decoder.mid.gate": torch.zeros(1)}), r"unknown decoder\.mid\.gate"),
        (lambda t: t.update({"decoder.conv_in.0.conv3d.weight": torch.zeros(32, 16, 3, 3)}), "expected 5 dimensions"),
        (lambda t: t.update({"decoder.conv_in.1.conv3d.weight": torch.zeros(32, 31, 3, 1, 1)}), "different sizes"),
        (lambda t: t.update({"decoder.norm_out.norm.weight": torch.zeros(5)}), r"norm_out\.weight: expected \[16\]"),
    ],
    ids=["conv", "upsample", "norm", "unknown", "flat", "product", "misshapen"],
)
def test_damaged_checkpoints_are_refused(cosmos, damage, message):
    tensors = dict(cosmos.state_dict())
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        CosmosDecoder.from_tensors(tensors, ORIGIN)


def test_the_published_sizes():
    with torch.device("meta"):
        video, image = (
            Cosmos(128, (2, 4, 4)),
            CosmosDecoder(ConvConfig(16, (256, 512, 512), 3, (), 48, 1, temporal=True)),
        )
    assert [round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for m in (video, image)] == [66.1, 48.5]
    assert image.patch_size == 16


class TestArchive:
    def test_has_the_tensors_that_torch_would_load(self, archive):
        tensors = read_torchscript(archive)
        loaded = torch.jit.load(str(archive)).state_dict()
        assert loaded
        for name, tensor in loaded.items():
            assert torch.equal(tensors[name], tensor)

    def test_converts_to_the_same_decoder(self, cosmos, archive, tmp_path):
        target = tmp_path / "cosmos.safetensors"
        done = CliRunner().invoke(app, ["convert", "cosmos", str(archive), str(target)])
        assert done.exit_code == 0, done.output
        assert "weights" in done.output
        decoder = CosmosDecoder.from_tensors(load_file(target), target)
        torch.testing.assert_close(decoder(grid()), expected(cosmos).clamp(-1, 1), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("size", [0, 100, 5000])
    def test_that_is_cut_off_is_refused(self, archive, tmp_path, size):
        (tmp_path / "decoder.jit").write_bytes(archive.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"decoder\.jit: not a whole TorchScript archive"):
            read_torchscript(tmp_path / "decoder.jit")

    def test_that_is_missing_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no decoder\.jit"):
            read_torchscript(tmp_path / "decoder.jit")

    def test_with_code_in_its_pickle_runs_nothing(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        code = pickle.dumps(Payload())
        with zipfile.ZipFile(tmp_path / "decoder.jit", "w") as file:
            file.writestr("decoder/data.pkl", code)
        with pytest.raises(CheckpointError, match="is no part of a tensor"):
            read_torchscript(tmp_path / "decoder.jit")
        assert not (tmp_path / "ran").exists()
        pickle.loads(code)
        assert (tmp_path / "ran").exists()  # a plain unpickler would have run it

    def test_with_a_tensor_past_its_storage_is_refused(self, tmp_path):
        class Storage:
            """Written as a reference to an entry of one float."""

        class Tensor:
            def __reduce__(self):
                return torch._utils._rebuild_tensor_v2, (Storage(), 0, (4,), (1,), False, {})

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                return ("storage", torch.FloatStorage, "0", "cpu", 1) if isinstance(value, Storage) else None

        with zipfile.ZipFile(tmp_path / "decoder.jit", "w") as file:
            with file.open("decoder/data.pkl", "w") as entry:
                Pickler(entry).dump(Tensor())
            file.writestr("decoder/data/0", bytes(4))
        with pytest.raises(CheckpointError, match=r"a tensor of \[4\] reaches past its storage of 1"):
            read_torchscript(tmp_path / "decoder.jit")

    def test_of_another_model_is_refused(self, tmp_path):
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "decoder.jit"))
        with pytest.raises(CheckpointError, match="missing decoder"):
            CosmosDecoder.from_tensors(read_torchscript(tmp_path / "decoder.jit"), tmp_path / "decoder.jit")


def test_only_safetensors_are_written(archive, tmp_path):
    done = CliRunner().invoke(app, ["convert", "cosmos", str(archive), str(tmp_path / "cosmos.pt")])
    assert "expected a .safetensors file" in str(done.exception)
    assert not list(tmp_path.iterdir())
