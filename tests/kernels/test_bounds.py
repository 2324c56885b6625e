"""No lane of a fused kernel touches memory that is no element of its arguments; kernels that do are noticed.

Each run is a process of its own, in Triton's interpreter: see bounds.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run(*names: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("bounds.py")), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "names",
    [
        ["canary-nothing"],
        ["verify-row"],
        ["verify-tiled"],
        ["verify-past-the-end"],
        ["verify-not-finite"],
        [f"attention-{name}" for name in ("page1", "page64", "tree", "no-page", "chunks")],
    ],
    ids=" ".join,
)
def test_every_address_is_an_element_of_an_argument(names):
    done = run(*names)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "noticed"),
    [
        ("canary-load", "load: 1 of 6 addresses are no element of an argument; the first lies 20 bytes from x_ptr"),
        ("canary-store", "store: 1 of 1 addresses are no element of an argument; the first lies 12 bytes from out_ptr"),
        ("canary-atomic", "atomic: 1 of 1 addresses are no element of an argument; the first lies 4 bytes from ticket"),
        ("short-num_committed", "load: 1 of 1 addresses are no element of an argument"),
        ("short-published", "from published_ptr"),
        ("attention-wild-page", "load: 384 of 384 addresses are no element of an argument"),
        ("short-ticket", "atomic: 1 of 1 addresses are no element of an argument"),
    ],
)
def test_a_wild_address_is_noticed(name, noticed):
    done = run(name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert noticed in done.stdout
