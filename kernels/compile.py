"""Compiling the fused kernels for GPUs that are not there, and reading what the compiler made of them.

The launcher itself is called; only Triton's last step, the launch, is left out. So what is compiled here has the very
signature, constants and options of what runs.

    python -m sjd_engine.kernels.compile                        # the resources of every kernel of the matrix, as JSON
    python -m sjd_engine.kernels.compile sm_90 gfx942           # of two targets
    python -m sjd_engine.kernels.compile > tests/kernels/resources.json

Triton decides when its functions are decorated whether they are interpreted, so TRITON_INTERPRET must not be set.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import launch
from .noise import NoisePlan, NoiseState
from .state import Grid, WindowState

CUDA_TARGETS = {f"sm_{version}": version for version in (80, 86, 89, 90, 100, 120)}
HIP_TARGETS = ("gfx942", "gfx90a")
TARGETS = (*CUDA_TARGETS, *HIP_TARGETS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCH_SIZE, WINDOW_SIZE, ROWS, COLS, TILED_VOCAB = 2, 96, 48, 48, 65536  # what the kernels are specialised for
# Launches of `verify`, guided and with top-k: the default method, the one with the most work in a row, the
# deterministic one, and the default with a tree.
VARIANTS = {
    "maximal": {"accept": "ratio", "refresh": "maximal", "init": "random"},
    "widest": {"accept": "ratio", "refresh": "reuse", "init": "above-sample"},  # and all that is optional
    "exact": {"accept": "match", "refresh": "gumbel", "init": "random"},
    "tree": {"accept": "ratio", "refresh": "maximal", "init": "random", "tree": (3, 3)},
}
VARIANT_TARGETS = {
    "maximal": TARGETS,
    "widest": ("sm_80", "sm_90", "gfx942"),
    "exact": ("sm_90",),
    "tree": ("sm_80",),
}
SCARCE = ("sm_80", "sm_120")  # where registers have run out before
SEQUENCES, KV_HEADS, GROUP, TABLE_WIDTH = 2, 8, 4, 64
# Page size of the launches of `window_attention`: under the causal rule, a block of keys in one page, or with a tree's
# bias, a page for each key; and of what puts their chunks together.
ATTENTION_VARIANTS = {"causal": 64, "tree": 16, "combine": 64}


@dataclass(frozen=True)
class VerifyKernel:
    """One kernel of the matrix: `row` names a row of `launch.LAUNCHES`; the others are keys of the tables above."""

    target: str
    row: str
    dtype: str
    variant: str
    function = "_verify_kernel"

    def __str__(self) -> str:
        return f"{self.target}-{self.row}-{self.dtype}-{self.variant}"

    def launch(self) -> None:
        """Call `verify` on tensors whose values nobody reads."""
        from . import verify

        row = next(row for row in launch.LAUNCHES if row.name == self.row)
        vocab_size, num_tokens = row.max_vocab or TILED_VOCAB, ROWS * COLS
        every = self.variant == "widest"
        floats, ints = torch.ones(BATCH_SIZE), torch.ones(BATCH_SIZE, dtype=torch.int64)
        positions = torch.empty(num_tokens, dtype=torch.int64)
        options: dict[str, Any] = VARIANTS[self.variant]
        state = WindowState.new(
            BATCH_SIZE,
            num_tokens,
            WINDOW_SIZE,
            "cpu",
            drafted_codes=vocab_size if every else 0,
            tree=options.get("tree"),
        )
        logits = torch.empty(2, BATCH_SIZE, state.published.shape[1], vocab_size, dtype=DTYPES[self.dtype])
        state.previous_logits = torch.empty_like(logits)
        verify(
            logits,
            state,
            Grid(positions if every else None, positions, positions, COLS),
            window_size=WINDOW_SIZE,
            seeds=ints,
            guidance_scale=floats,
            temperature=floats if every else None,
            top_k=ints,
            top_p=floats if every else None,
            reuse_threshold=floats,
            **options,
        )


@dataclass(frozen=True)
class AttentionKernel:
    """One kernel of the matrix: `row` names a row of the dtype's `launch.attention_table`, `variant` is a key of the
    table above."""

    target: str
    row: str
    dtype: str
    head_dim: int
    variant: str

    def __str__(self) -> str:
        return f"{self.target}-attention-{self.row}-{self.dtype}-d{self.head_dim}-{self.variant}"

    @property
    def function(self) -> str:
        return "_combine_kernel" if self.variant == "combine" else "_attend_kernel"

    @property
    def blocks(self) -> launch.AttentionLaunch:
        """The row of the table."""
        return next(row for row in launch.attention_table(DTYPES[self.dtype]) if row.name == self.row)

    def launch(self) -> None:
        """Call `window_attention` on tensors whose values nobody reads."""
        from .attention import window_attention

        dtype, num_new = DTYPES[self.dtype], self.blocks.rows // GROUP
        table = torch.empty(SEQUENCES, TABLE_WIDTH, dtype=torch.int32)
        window_attention(
            torch.empty(SEQUENCES, num_new, KV_HEADS * GROUP, self.head_dim, dtype=dtype),
            torch.empty(1, 2, ATTENTION_VARIANTS[self.variant], KV_HEADS, self.head_dim, dtype=dtype),
            table,
            table[0, :SEQUENCES],
            span=TABLE_WIDTH * 16,
            window_bias=torch.empty(num_new, num_new) if self.variant == "tree" else None,
        )


@dataclass(frozen=True)
class DenoiseKernel:
    """One kernel of the matrix: `hidden` columns of an embedding of `dtype`."""

    target: str
    dtype: str
    hidden: int
    function = "_denoise_kernel"

    def __str__(self) -> str:
        return f"{self.target}-denoise-{self.dtype}-h{self.hidden}"

    def launch(self) -> None:
        """Call `denoise` on tensors whose values nobody reads."""
        from .denoise import denoise

        column, level = torch.empty(self.hidden), torch.empty(2)
        embeddings = torch.empty(16, self.hidden, dtype=DTYPES[self.dtype])
        plan = NoisePlan(embeddings, column, column, column, torch.empty(2, self.hidden), level, level)
        state = NoiseState(torch.empty(2, 16, dtype=torch.int32), torch.empty(2, 16, self.hidden))
        counts = torch.empty(2, dtype=torch.int64)
        denoise(state, plan, torch.empty(2, 32, dtype=torch.int64), counts, counts, 4)


Case = VerifyKernel | AttentionKernel | DenoiseKernel


def matrix() -> list[Case]:
    """`verify`: every row of its table for every target in bfloat16; the default method in the other dtypes, too, where
    registers are scarce: they differ in the conversion of what is loaded. `window_attention`: what takes most registers
    for every target, the rest where compilers differ most. `denoise`: every target."""
    return [
        *(
            VerifyKernel(target, row.name, dtype, variant)
            for variant, targets in VARIANT_TARGETS.items()
            for row in launch.LAUNCHES
            for target in targets
            for dtype in (DTYPES if variant == "maximal" and target in SCARCE else ("bf16",))
        ),
        *(AttentionKernel(target, "rows-64", "bf16", 128, "tree") for target in TARGETS),
        *(AttentionKernel(target, "rows-64", "bf16", 128, "combine") for target in ("sm_90", "gfx942")),
        *(
            AttentionKernel(target, row, "bf16", 128, "causal")
            for row in ("rows-16", "rows-32")
            for target in ("sm_90", "gfx942")
        ),
        *(AttentionKernel("sm_120", row, "bf16", 100, "tree") for row in ("rows-16", "rows-32", "rows-64")),
        AttentionKernel("sm_90", "rows-64", "bf16", 64, "causal"),
        AttentionKernel("sm_80", "rows-32", "fp32", 128, "tree"),
        AttentionKernel("sm_100", "rows-32", "fp32", 128, "causal"),
        *(DenoiseKernel(target, "bf16", 4096) for target in TARGETS),
        DenoiseKernel("sm_90", "fp32", 256),
    ]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, read from its machine code.

    registers: of a thread; vector registers on AMD.
    stack_bytes: local or scratch memory of a thread.
    spills: NVIDIA: instructions that load or store local memory. AMD: vector registers spilled.
    shared_bytes: of a program.
    threads: of a program.
    atomics: instructions on global memory.
    atomic_after_barrier: a barrier stands between the last store to global memory before the first atomic and it, so
        that a ticket announces what every thread of the program has stored.
    wide_loads: instructions that load 16 bytes of global memory, to registers or shared memory.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    threads: int
    atomics: int
    atomic_after_barrier: bool
    wide_loads: int


# ----------------------------------------------------------------------------------------------------------- compiling


class OfflineDriver:
    """What a launch asks of Triton's driver up to the point where the kernel is compiled."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # kernels are cached by device: one for each target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compile_only(target: str) -> Iterator[list[Any]]:
    """Inside, a Triton launch compiles for `target`, one of TARGETS, and runs nothing. Yields the kernels so far.

    Raises: RuntimeError under TRITON_INTERPRET.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("compile_only: kernels are interpreted in this process; unset TRITON_INTERPRET")
    kernels: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    cuda = CUDA_TARGETS.get(target)
    driver.set_active(OfflineDriver(GPUTarget("cuda", cuda, 32) if cuda else GPUTarget("hip", target, 64)))
    JITFunction.run = compile_instead
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver.set_active(active)


# ---------------------------------------------------------------------------------------------------------- inspection


def inspect(kernel: Any) -> Resources:
    """The resources of a kernel from `compile_only`."""
    read = inspect_cuda if "cubin" in kernel.asm else inspect_hip
    return read(kernel)


def inspect_cuda(kernel: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = disassemble(file.name)
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    atomics, after_barrier = ticket(text, SASS)
    return Resources(
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", text)),
        shared_bytes=kernel.metadata.shared,
        threads=kernel.metadata.num_warps * 32,
        atomics=atomics,
        atomic_after_barrier=after_barrier,
        wide_loads=len(re.findall(r"\bLDG(?:STS)?\.E[.\w]*\.128\b", text)),
    )


def disassemble(cubin: str) -> str:
    """Resource usage and SASS, by the tool that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [tool, "-res-usage", "-sass", cubin], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout


def inspect_hip(kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", text))
    atomics, after_barrier = ticket(text, AMDGCN)
    return Resources(
        registers=int(usage["vgpr_count"]),
        stack_bytes=int(usage["private_segment_fixed_size"]),
        spills=int(usage["vgpr_spill_count"]),
        shared_bytes=kernel.metadata.shared,
        threads=kernel.metadata.num_warps * 64,
        atomics=atomics,
        atomic_after_barrier=after_barrier,
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
    )


class Mnemonics(NamedTuple):
    """Regular expressions of the instructions that make up a ticket; stores and atomics on global memory."""

    store: str
    barrier: str
    atomic: str


SASS = Mnemonics(r"\bSTG?\.E", r"\bBAR\.SYNC", r"\b(?:ATOMG?|REDG?)\.")
AMDGCN = Mnemonics(r"\b(?:global|buffer|flat)_store_", r"\bs_barrier", r"\b(?:global|buffer|flat)_atomic_")


def ticket(listing: str, mnemonics: Mnemonics) -> tuple[int, bool]:
    """Number of atomics, and whether a barrier stands between the last store before the first of them and it."""
    atomics = list(re.finditer(mnemonics.atomic, listing))
    if not atomics:
        return 0, False
    after_store = re.split(mnemonics.store, listing[: atomics[0].start()])[-1]
    return len(atomics), re.search(mnemonics.barrier, after_store) is not None


# ------------------------------------------------------------------------------------------------------------- matrix


def compile_case(case: Case) -> Resources:
    """Compile what the launcher launches in `case`."""
    with compile_only(case.target) as kernels:
        case.launch()
    (kernel,) = (kernel for kernel in kernels if kernel.name == case.function)  # one launch of it
    return inspect(kernel)


def compile_cases(cases: list[Case], num_processes: int = 2) -> Iterator[Resources]:
    """The resources of `cases`, in their order, compiled in fresh processes with a cache of their own."""
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(
            num_processes, mp_context=get_context("spawn"), initializer=start_worker, initargs=(cache,)
        )
        with pool:
            yield from pool.map(compile_case, cases)


def start_worker(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # of the caller; Triton is not imported here yet
    os.environ["TRITON_CACHE_DIR"] = cache  # a kernel from an older cache would hide what the source became
    torch.set_num_threads(1)


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    args = parser.parse_args()
    cases = [case for case in matrix() if case.target in args.targets]
    lines = []
    for case, resources in zip(cases, compile_cases(cases), strict=True):
        print(case, resources, file=sys.stderr, flush=True)
        lines.append(f'    "{case}": {json.dumps(asdict(resources))}')
    body = ",\n".join(lines)
    print(f'{{\n  "triton": "{triton.__version__}",\n  "resources": {{\n{body}\n  }}\n}}')


if __name__ == "__main__":
    main()
