import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from PIL import Image

from sjd_engine import Engine, cli
from sjd_engine.models.neighbours import FILE, load_neighbours


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def sjd(tmp_path, monkeypatch, capsys) -> Callable[..., Done]:
    """Runs a command in `tmp_path`, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["sjd", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


def test_generate_writes_a_png_with_its_recipe(tmp_path):
    """As a process of its own."""
    command = [sys.executable, "-m", "sjd_engine.cli", "generate", "a red apple", "-o", "deep/apple.png"]
    command += ["--seed", "3", "--top-k", "50"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "passes (NFE)" in done.stdout
    with Image.open(tmp_path / "deep" / "apple.png") as image:
        assert image.size == (64, 64)
        recipe = json.loads(image.text["sjd_engine"])
    assert recipe["prompt"] == "a red apple"
    assert recipe["seed"] == 3
    assert recipe["method"] == "maximal"
    assert recipe["top_k"] == 50


def test_several_images_get_numbers(sjd, tmp_path):
    done = sjd("generate", "a cat", "-n", "2", "-o", "cat.png")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat-0.png", "cat-1.png"]


def test_fit_drafts_writes_tables_of_the_model_s_own_images(sjd, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n\na cat\n")
    done = sjd("fit-drafts", "prompts.txt", "-n", "1", "-o", FILE)
    assert done.returncode == 0, done.stderr
    assert f"{FILE}: 2 images of 16x16 codes" in done.stdout
    assert load_neighbours(tmp_path, 1000) is not None
    assert sjd("fit-drafts", "prompts.txt", "-o", "tables.png").returncode == 2
    assert sjd("fit-drafts", "missing.txt", "-o", FILE).returncode == 1


@pytest.fixture
def asked_for(monkeypatch) -> dict:
    """What the engine is asked for; it draws nothing."""
    asked: dict = {}

    def generate(self, prompt, **arguments):
        asked.update(arguments)
        raise ValueError("nothing drawn")

    monkeypatch.setattr(Engine, "generate", generate)
    return asked


@pytest.mark.parametrize(
    ("option", "text", "argument", "value"),
    [
        ("--method", "sjd", "method", "sjd"),
        ("--window", "24", "window_size", 24),
        ("--window", "auto", "window_size", "auto"),
        ("--seed", "-7", "seed", -7),
        ("-n", "3", "num_images_per_prompt", 3),
        ("--guidance-scale", "2.5", "guidance_scale", 2.5),
        ("--temperature", "0.5", "temperature", 0.5),
        ("--top-k", "50", "top_k", 50),
        ("--top-p", "0.9", "top_p", 0.9),
        ("--negative-prompt", "a dog", "negative_prompt", "a dog"),
        ("--height", "64", "height", 64),
        ("--width", "64", "width", 64),
        ("--init", "above-law", "init", "above-law"),
        ("--reuse-threshold", "0.3", "reuse_threshold", 0.3),
        ("--tree", "3,2", "tree", (3, 2)),
        ("--relaxation", "7", "relaxation", 7),
        ("--relaxation", "1.5", "relaxation", 1.5),
        ("--zipar-window", "4", "zipar_window", 4),
        ("--steps", "5", "steps", 5),
        ("--verify", "paper", "verify", "paper"),
    ],
)
def test_an_option_reaches_the_engine_as_its_argument(sjd, asked_for, option, text, argument, value):
    done = sjd("generate", "a cat", option, text)
    assert (done.returncode, done.stderr) == (2, "sjd: nothing drawn\n")
    assert (asked_for[argument], type(asked_for[argument])) == (value, type(value))


def test_what_is_left_out_is_the_engines_default(sjd, asked_for):
    sjd("generate", "a cat")
    assert asked_for == {"method": "maximal", "window_size": "auto", "seed": 0, "num_images_per_prompt": 1}


def test_every_argument_of_generate_has_an_option():
    arguments = set(inspect.signature(Engine.generate).parameters) - {"self", "prompt"}
    arguments -= {"output_type", "callback_on_step", "progress"}  # PNG files, for people
    names = {"n": "num_images_per_prompt", "window": "window_size"}
    assert arguments <= {names.get(name, name) for name in inspect.signature(cli.generate).parameters}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["a cat", "--method", "magic", "-o", "new/cat.png"], 2, "known methods"),
        (["", "-o", "x.png"], 2, "prompt: expected words"),
        (["a cat", "--window", "-2"], 2, "window_size: expected >= 1"),
        (["a cat", "--window", "wide"], 2, "window_size: expected an int or 'auto', got 'wide'"),
        (["a cat", "--top-k", "-1"], 2, "top_k: expected >= 0"),
        (["a cat", "--tree", "3x3"], 2, "tree: expected two numbers such as 3,3"),
        (["a cat", "--relaxation", "2"], 2, "relaxation: maximal has none, only gsd, lantern"),
        (["a cat", "--zipar-window", "2"], 2, "zipar_window: maximal has none"),
        (["a cat", "--height", "128"], 2, "emoji draws 64x64 pixels, got 128x64"),
        (["a cat", "-o", "cat.jpg"], 2, "expected a .png file"),
        (["a cat", "-o", "taken/cat.png"], 2, "is not a writable folder"),
        (["a cat", "--model", "nowhere"], 1, "neither a bundled model"),
        (["a cat", "--colour", "red"], 2, "No such option"),
        (["a cat", "--window", "many"], 2, "window"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_write_nothing(sjd, tmp_path, arguments, status, message):
    (tmp_path / "taken").write_text("a file where a folder should be")
    done = sjd("generate", *arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_doctor_names_versions_and_backend(sjd):
    done = sjd("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "verify", "cpu", "compiled", "dtype", "pages", "attention"):
        assert word in done.stdout


def test_doctor_tells_the_memory_of_a_model(sjd):
    done = sjd("doctor", "--model", "emoji")
    assert done.returncode == 0, done.stderr
    for line in ("weights       transformer", "MB an image: 2 x 256 tokens", "MB of this process"):
        assert line in done.stdout


def test_doctor_names_every_attention_with_what_it_asks_for(sjd):
    lines = sjd("doctor").stdout.splitlines()
    lines = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert list(lines) == ["cpu", "triton", "flash_attn_2", "flash_attn_3", "varlen", "flashinfer", "reference"]
    assert "pages of 256n tokens; float16, bfloat16; host sync, no CUDA graph; trees by triton" in lines["flash_attn_2"]
    assert "no: it runs on cuda, not on cpu" in lines["flashinfer"] or "pip install" in lines["flashinfer"]


def test_an_attention_that_cannot_run_is_an_error(sjd, monkeypatch):
    monkeypatch.setenv("SJD_ATTENTION", "flashinfer")
    done = sjd("doctor")
    assert (done.returncode, done.stderr.count("sjd: SJD_ATTENTION=flashinfer: ")) == (1, 1), done.stderr
