"""No lane of a fused kernel touches memory that is no element of its arguments; kernels that do are noticed.

All runs share one process, in Triton's interpreter: see bounds.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SOUND = [
    "canary-nothing",
    *(f"verify-{name}" for name in ("row", "tiled", "past-the-end", "not-finite", "tree")),
    *(f"attention-{name}" for name in ("page1", "page64", "tree", "no-page", "chunks")),
]
WILD = {
    "canary-load": "load: 1 of 6 addresses are no element of an argument; the first lies 20 bytes from x_ptr",
    "canary-store": "store: 1 of 1 addresses are no element of an argument; the first lies 12 bytes from out_ptr",
    "canary-atomic": "atomic: 1 of 1 addresses are no element of an argument; the first lies 4 bytes from ticket",
    "short-num_committed": "load: 1 of 1 addresses are no element of an argument",
    "short-published": "from published_ptr",
    "attention-wild-page": "load: 384 of 384 addresses are no element of an argument",
    "short-ticket": "atomic: 1 of 1 addresses are no element of an argument",
}


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """What was printed of each run."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("bounds.py")), *SOUND, *WILD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return {name: text for name, _, text in (line.partition(": ") for line in done.stdout.splitlines())}


@pytest.mark.parametrize("name", SOUND)
def test_every_address_is_an_element_of_an_argument(told, name):
    assert told[name] == "in bounds"


@pytest.mark.parametrize("name", WILD)
def test_a_wild_address_is_noticed(told, name):
    assert WILD[name] in told[name]
