"""The fused kernels compile for every GPU, without one here, and take no more of it than `resources.json` says.

After a change that is meant to change it:  python -m sjd_engine.kernels.compile > tests/kernels/resources.json
"""

import json
from pathlib import Path

import pytest

from sjd_engine.kernels import launch
from sjd_engine.kernels.compile import (
    CUDA_TARGETS,
    DTYPES,
    SASS,
    AttentionKernel,
    DenoiseKernel,
    Resources,
    VerifyKernel,
    compile_cases,
    compile_only,
    matrix,
    ticket,
)

triton = pytest.importorskip("triton")

EXPECTED = json.loads((Path(__file__).parent / "resources.json").read_text())
MATRIX = matrix()
# What a register allocator may move without anyone having made the kernel worse.
REGISTER_TOLERANCE = 0.1
SHARED_TOLERANCE_BYTES = 256
# Registers of a streaming multiprocessor, and of a compute unit: a program needs its share of one of them. Bytes of
# shared memory that a program may have, on the smallest of each family.
REGISTER_FILE = {"sm": 65536, "gfx": 131072}
SHARED_MEMORY = {"sm": 99 * 1024, "gfx": 64 * 1024}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    """In processes of their own: this one may be interpreting kernels."""
    return dict(zip(map(str, MATRIX), compile_cases(MATRIX), strict=True))


@pytest.mark.parametrize("case", MATRIX, ids=str)
class TestEveryKernel:
    def test_it_spills_nothing(self, compiled, case):
        assert (compiled[str(case)].stack_bytes, compiled[str(case)].spills) == (0, 0)

    def test_a_program_fits_the_register_file_and_shared_memory(self, compiled, case):
        resources, family = compiled[str(case)], "sm" if case.target in CUDA_TARGETS else "gfx"
        granted = -(-resources.registers // 8) * 8
        assert granted * resources.threads <= REGISTER_FILE[family]
        assert resources.shared_bytes <= SHARED_MEMORY[family]

    @pytest.mark.skipif(triton.__version__ != EXPECTED["triton"], reason="the figures are of another Triton")
    def test_it_takes_what_it_took(self, compiled, case):
        now, then = compiled[str(case)], EXPECTED["resources"][str(case)]
        assert now.threads == then["threads"]
        assert now.registers <= max(then["registers"] * (1 + REGISTER_TOLERANCE), then["registers"] + 8)
        assert now.shared_bytes <= then["shared_bytes"] + SHARED_TOLERANCE_BYTES


@pytest.mark.parametrize("case", [case for case in MATRIX if isinstance(case, VerifyKernel)], ids=str)
class TestVerify:
    def test_one_atomic_announces_what_a_barrier_has_completed(self, compiled, case):
        assert compiled[str(case)].atomics == 1
        assert compiled[str(case)].atomic_after_barrier

    def test_a_row_is_read_16_bytes_at_a_time(self, compiled, case):
        resources = compiled[str(case)]
        row = next(row for row in launch.LAUNCHES if row.name == case.row)
        both = 2 * row.tile * DTYPES[case.dtype].itemsize  # conditional and unconditional logits
        assert resources.wide_loads >= both // (16 * resources.threads)


@pytest.mark.parametrize("case", [case for case in MATRIX if isinstance(case, AttentionKernel)], ids=str)
class TestAttention:
    def test_it_needs_no_atomics(self, compiled, case):
        assert compiled[str(case)].atomics == 0

    def test_keys_and_values_are_read_16_bytes_at_a_time(self, compiled, case):
        resources = compiled[str(case)]
        both = 2 * case.blocks.keys * case.head_dim * DTYPES[case.dtype].itemsize
        if case.variant == "combine":
            both = 8 * launch.combine_rows(case.head_dim) * case.head_dim * 4  # eight chunks of float32 sums
        if case.head_dim % 8:
            both = 0  # heads do not begin at multiples of 16 bytes
        assert resources.wide_loads >= both // (16 * resources.threads)


@pytest.mark.parametrize("case", [case for case in MATRIX if isinstance(case, DenoiseKernel)], ids=str)
class TestDenoise:
    def test_the_noise_is_read_16_bytes_at_a_time_without_atomics(self, compiled, case):
        resources = compiled[str(case)]
        columns = launch.denoise_block(case.hidden)
        each = 4 * columns // (16 * resources.threads)  # noise, mean, 1 / std, std, encoding
        assert resources.wide_loads >= 5 * each
        assert resources.atomics == 0


def test_the_expected_resources_are_of_this_matrix():
    assert list(EXPECTED["resources"]) == [str(case) for case in MATRIX]


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("STG.E [R2] ; BAR.SYNC 0x0 ; ATOMG.E.ADD R0 ;", (1, True)),
        ("BAR.SYNC 0x0 ; STG.E [R2] ; ATOMG.E.ADD R0 ;", (1, False)),
        ("STG.E [R2] ; ATOMG.E.ADD R0 ; BAR.SYNC 0x0 ; ATOMG.E.ADD R0 ;", (2, False)),
        ("STG.E [R2] ; BAR.SYNC 0x0 ; CREDUX.MAX R1 ; REDUX.SUM R1 ; ATOMS.ADD R1 ;", (0, False)),
    ],
)
def test_a_listing_without_the_barrier_is_told_apart(listing, expected):
    assert ticket(listing, SASS) == expected


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), compile_only("sm_90"):
        pass
