"""The package builds without torch, loads without torch or CUDA, and says what is missing."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def module(sdist, tmp_path_factory) -> Path:
    """The compiled module of a wheel built from the sdist, in pip's isolated environment, without CUDA."""
    folder = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "pip", "wheel", sdist, "--no-deps", "-w", folder, SJD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.startswith("sjd_engine/_C."))
        return Path(archive.extract(name, folder))


def test_the_sdist_holds_all_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert sources | {"kernels/reference.py", "sjd_engine/py.typed", "setup.py"} <= names


def test_the_module_loads_without_torch_and_without_cuda(module, tmp_path):
    bare = tmp_path / "bare"
    assert run(sys.executable, "-m", "venv", "--without-pip", bare).returncode == 0
    code = f"""if True:
        import importlib.util
        spec = importlib.util.spec_from_file_location("_C", {str(module)!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        print(native.has_cuda, native.cuda_archs, native.isa())
        try:
            native.cuda_devices()
        except RuntimeError as error:
            print(error)
    """
    done = run(bare / "bin" / "python", "-I", "-c", code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("False () ")
    assert second.startswith("cuda_devices: this build of sjd_engine has no CUDA")


def test_no_cuda_library_is_loaded_at_import():
    """The CUDA runtime is linked statically, so the module of this environment loads where there is none."""
    from sjd_engine import native

    if not native.available():
        pytest.skip(native.why_not())
    assert not re.search("libcu|libtorch", run("ldd", native._C.__file__).stdout)


def test_cuda_without_nvcc_says_what_to_do(tmp_path):
    done = run(
        sys.executable,
        "setup.py",
        "-q",
        *("build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path),
        SJD_CUDA="1",
        PATH=str(tmp_path),
        CUDACXX="",
        CUDA_HOME="",
    )
    assert done.returncode != 0
    assert "SJD_CUDA=1, but no nvcc was found" in done.stderr
    assert "install the CUDA toolkit or set CUDA_HOME, or build without CUDA: SJD_CUDA=0" in done.stderr


def test_an_unknown_value_of_sjd_cuda_is_refused(tmp_path):
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, SJD_CUDA="yes")
    assert "SJD_CUDA: expected auto, 0 or 1, got 'yes'" in done.stderr
