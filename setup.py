"""Builds `sjd_engine._C` with pybind11 alone: no torch header, so pip's build isolation works and a new torch needs no
new build.

`kernels/` lies at the root of the repository and is imported as `sjd_engine.kernels`: a top-level package of that name
would collide with Hugging Face's.

Environment:
    SJD_CUDA        auto (default): CUDA sources where nvcc is found. 1: fail without nvcc. 0: plain C++.
    SJD_CUDA_ARCHS  "80;90": architectures to compile for; default: those of ARCHS that nvcc knows.
    MAX_JOBS        compilers that run at once; default: one for each core.
    CUDACXX, CUDA_HOME, PATH: where nvcc is looked for, in this order.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ARCHS = ("80", "86", "89", "90", "100", "120")
# A float32 operation rounds once, and in the order it is written: decisions are equal bit for bit on every backend.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-Wall", "-Wextra"]


def find_nvcc() -> str | None:
    """The path of nvcc where CUDA is to be built, else None."""
    wanted = os.environ.get("SJD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"SJD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc")
    nvcc = next((path for candidate in candidates if candidate and (path := shutil.which(candidate))), None)
    if wanted == "1" and nvcc is None:
        raise RuntimeError(
            "SJD_CUDA=1, but no nvcc was found in $CUDACXX, $CUDA_HOME/bin or PATH; "
            "install the CUDA toolkit or set CUDA_HOME, or build without CUDA: SJD_CUDA=0"
        )
    return None if wanted == "0" else nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to compile for, lowest first."""
    chosen = os.environ.get("SJD_CUDA_ARCHS")
    if chosen:
        return sorted(chosen.split(";"), key=int)
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHS if f"compute_{arch}" in known]


def library_dirs(nvcc: str) -> list[str]:
    """Where nvcc itself looks for the CUDA runtime: it differs between system, conda and pip toolkits."""
    steps = subprocess.run([nvcc, "--dryrun", "-shared", "none.o"], capture_output=True, text=True, check=True).stderr
    line = next(line for line in steps.splitlines() if line.startswith("#$ LIBRARIES="))
    return [flag.removeprefix("-L") for flag in shlex.split(line.partition("=")[2])]


class BuildNative(build_ext):
    """Compiles .cu sources with nvcc beside the C++ ones, and links the CUDA runtime statically."""

    def build_extensions(self) -> None:
        nvcc = find_nvcc()
        if nvcc is not None:
            self.use_cuda(nvcc, cuda_archs(nvcc))
        super().build_extensions()

    def use_cuda(self, nvcc: str, archs: list[str]) -> None:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX, for what comes later
        flags = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        names = " ".join([*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"])
        (extension,) = self.extensions
        extension.sources += sorted(str(source) for source in Path("csrc").glob("*.cu"))
        extension.define_macros.append(("SJD_CUDA_ARCHS", f'"{names}"'))

        compile_cxx = self.compiler._compile

        def compile_any(obj, src, ext, cc_args, extra_postargs, pp_opts):
            if ext == ".cu":
                self.spawn([nvcc, *flags, *targets, "-c", src, "-o", obj])
            else:
                compile_cxx(obj, src, ext, cc_args, extra_postargs, pp_opts)

        self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        self.compiler._compile = compile_any
        extension.library_dirs += library_dirs(nvcc)
        extension.libraries += ["cudart_static", "rt", "dl"]


ParallelCompile("MAX_JOBS").install()
setup(
    packages=[*find_packages(include=["sjd_engine*"]), "sjd_engine.kernels"],
    package_dir={"sjd_engine.kernels": "kernels"},
    package_data={"sjd_engine": ["assets/*/*", "py.typed", "serve/page/*"]},
    ext_modules=[
        Pybind11Extension(
            "sjd_engine._C",
            # sjd_c.cpp is the library for C, see csrc/CMakeLists.txt.
            sorted(str(source) for source in Path("csrc").glob("*.cpp") if source.stem != "sjd_c"),
            depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
            cxx_std=17,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-lpthread"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
