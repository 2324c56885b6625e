"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, and the CUDA kernels' use of registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
COMPILED = (
    "attention_cpu",
    "layers_cpu",
    "linear_cpu",
    "page_allocator",
    "paged_kv_cpu",
    "products",
    "rows",
    "verify_cpu",
)
SOURCES = [CSRC / f"{name}.cpp" for name in COMPILED]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def compiled(source: Path, into: Path) -> Path:
    """The object of one source, which finds headers in its own folder first."""
    target = into / f"{source.stem}.o"
    # -O0: compiling takes longer than running.
    done = run("g++", "-std=c++17", "-g1", "-ffp-contract=off", *SANITIZERS, f"-I{CSRC}", "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def sanitized(objects: dict[str, Path], into: Path) -> subprocess.CompletedProcess:
    """A run of the program that `objects` are linked to."""
    program = into / "sanitized"
    linked = run("g++", *SANITIZERS, *objects.values(), "-o", program, "-lpthread")
    assert linked.returncode == 0, linked.stderr
    return run(program)


def broken_copy(name: str, right: str, wrong: str, into: Path) -> Path:
    """csrc with one line of the file `name` made wrong."""
    folder = shutil.copytree(CSRC, into / "csrc")
    text = (folder / name).read_text()
    assert text.count(right) == 1
    (folder / name).write_text(text.replace(right, wrong))
    return folder


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("objects")
    return {path.name: compiled(path, folder) for path in [*SOURCES, ROOT / "tests" / "csrc" / "sanitized.cpp"]}


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
class TestSanitized:
    def test_nothing_is_found(self, objects, tmp_path):
        done = sanitized(objects, tmp_path)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        ("broken", "right", "wrong", "compiles", "found"),
        [
            ("paged_kv.h", "i < bytes / 16;", "i <= bytes / 16;", "paged_kv_cpu.cpp", "heap-buffer-overflow"),
            ("paged_kv.h", "entry >= table_width", "entry > table_width", "paged_kv_cpu.cpp", "heap-buffer-overflow"),
            ("paged_kv.h", "context_lens[s] + num_new ?", "span ?", "paged_kv_cpu.cpp", "differs: gather_kv"),
            ("page_allocator.cpp", "if (num_tokens % page_size_) result", "if (false) result", None, "differs: what a"),
            ("attention_cpu.cpp", "-static_cast<int32_t>(rows[j] != nullptr)", "-1", None, "differs: window_attention"),
            ("linear_cpu.cpp", "std::min(kPanel, op.cols - begin)", "kPanel", None, "heap-buffer-overflow"),
        ],
        ids=[
            "one-past-a-row",
            "one-past-a-table",
            "stale-tokens",
            "a-fork-without-copies",
            "tokens-without-a-page",
            "one-past-a-panel",
        ],
    )
    def test_a_broken_op_is_found(self, objects, tmp_path, broken, right, wrong, compiles, found):
        """Negative controls."""
        source = broken_copy(broken, right, wrong, tmp_path) / (compiles or broken)
        done = sanitized({**objects, source.name: compiled(source, tmp_path)}, tmp_path)
        assert done.returncode != 0
        assert found in done.stderr


# ---------------------------------------------------------------------------------------------------------------- CUDA

ARCHS = ("sm_80", "sm_90", "sm_100")
KERNELS = {"device_info.cu": 0, "paged_kv.cu": 6}


def spills(source: Path, into: Path, archs: tuple[str, ...] = ARCHS) -> dict[str, list[list[int]]]:
    """[bytes of stack, spill stores, spill loads] of every kernel by architecture, as ptxas says it."""
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs]
    newest = archs[-1].replace("sm", "compute")
    done = run(
        *("nvcc", "-O3", "-std=c++17", "-fmad=false", "-Xptxas=-v", "--threads=0", *targets),
        *(f"-gencode=arch={newest},code={newest}", "-c", source, "-o", into / "kernels.o"),
    )
    assert done.returncode == 0, done.stderr
    entry = r"entry function '\w+' for '(\w+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)"
    found: dict[str, list[list[int]]] = {}
    for arch, *numbers in re.findall(entry, done.stderr):
        found.setdefault(arch, []).append([int(number) for number in numbers])
    return found


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
class TestKernels:
    @pytest.mark.parametrize("source", [path.name for path in sorted(CSRC.glob("*.cu"))])
    def test_nothing_spills(self, source, tmp_path):
        found = spills(CSRC / source, tmp_path)
        assert found == {arch: [[0, 0, 0]] * KERNELS[source] for arch in ARCHS if KERNELS[source]}

    def test_a_spill_would_be_seen(self, tmp_path):
        """Negative control: so many blocks on a multiprocessor that registers run out."""
        folder = broken_copy("paged_kv.cu", "kWarpsPerBlock, 4)", "kWarpsPerBlock, 8)", tmp_path)
        found = spills(folder / "paged_kv.cu", tmp_path, archs=("sm_80",))
        assert any(numbers != [0, 0, 0] for numbers in found["sm_80"])
