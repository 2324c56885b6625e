"""The fused kernel equals the reference, integer for integer: on a GPU, or without one in Triton's interpreter.

The interpreter is an oracle of meaning only: what the compiler makes of the kernel is checked by test_compile.py.
"""

from dataclasses import replace

import pytest
import torch

from sjd_engine import SamplingParams, Schedule
from sjd_engine.kernels import launch, reference
from sjd_engine.methods import INITS
from sjd_engine.testing import FUSED, VerifyCase, assert_same_decisions

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("without a GPU, TRITON_INTERPRET=1 must be set before Triton is imported", allow_module_level=True)

from sjd_engine.kernels import verify  # noqa: E402

GUIDED = SamplingParams(guidance_scale=3.0)
GUIDED_TOP_K = SamplingParams(guidance_scale=2.0, temperature=0.7, top_k=40)
TOP_K = SamplingParams(top_k=5)
LINES = Schedule.with_line_breaks(3, 3, token=70_000, end_tokens=[70_001])

CASES = {  # positional: method, V, W, B
    **{f"{name}-V7-W3-B2": VerifyCase(name, 7, 3, drift=0.3) for name in FUSED},
    **{
        f"{name}-V256-W3-topk": VerifyCase(name, 256, 3, 1, params=GUIDED_TOP_K, dtype=torch.bfloat16) for name in FUSED
    },
    **{f"{name}-V9000-W2-tiled": VerifyCase(name, 9000, 2, 1, params=GUIDED, spread=3.0) for name in FUSED},
    "topk-ties": VerifyCase("maximal", 256, 3, 1, params=TOP_K, ties=True, drift=0.0),
    "topk-tiled-ties": VerifyCase("sjd", 9000, 2, 1, params=SamplingParams(top_k=300), ties=True),
    "topp-ties": VerifyCase("maximal", 256, 2, 1, params=SamplingParams(top_p=0.8), ties=True),
    "topk-topp-tiled": VerifyCase("exact", 9000, 1, 1, params=SamplingParams(top_k=2000, top_p=0.5), spread=4.0),
    "top1": VerifyCase("maximal", 256, 3, 1, params=SamplingParams(top_k=1)),
    "V1000-W5-ragged": VerifyCase("maximal", 1000, 5, 2, params=GUIDED, drift=0.1),
    "V8192": VerifyCase("maximal", 8192, 3, 1, params=SamplingParams(2.0, 1.0, 2000), drift=0.2),
    "V65536": VerifyCase("maximal", 65536, 2, 1, params=SamplingParams(3.0, 1.0, 2000), dtype=torch.float16, drift=0.2),
    "forced": VerifyCase("maximal", 256, 5, 1, schedule=LINES, drift=0.1),
    "forced-exact": VerifyCase("exact", 256, 5, 1, schedule=LINES),
    "forced-above": VerifyCase("sjd", 256, 6, 1, schedule=LINES, init="above-sample"),
    "forced-inside-a-row": VerifyCase(
        "sjd", 256, 4, 1, schedule=Schedule(2, 4, {2: 7, 5: 9}), init="left-sample", drift=0.1
    ),
    "bad-numbers": VerifyCase("maximal", 256, 4, 1, params=SamplingParams(top_k=9), bad=0.3),
    "bad-numbers-tiled": VerifyCase("exact", 9000, 2, 1, params=GUIDED, bad=0.3),
    "bad-numbers-reuse": VerifyCase("sjd++", 7, 4, 1, bad=0.4),
    **{f"{init}-W6": VerifyCase("maximal", 256, 6, 1, init=init, drift=0.1) for init in INITS[1:]},
    "above-sample-narrow": VerifyCase("maximal", 256, 7, 1, init="above-sample", schedule=Schedule(8, 2), drift=0.1),
    "window-beyond-the-image": VerifyCase("maximal", 7, 20, 1, drift=0.0),
    "disjoint-laws": VerifyCase("maximal", 256, 4, 1, spread=30.0, drift=30.0, params=TOP_K),
    "subnormal": VerifyCase("maximal", 256, 3, 1, spread=1e-41, drift=1e-41, params=TOP_K),
    "overflowing": VerifyCase("sjd", 256, 3, 1, spread=1e38, drift=1e38, params=GUIDED),
    "negative-zeros": VerifyCase("exact", 256, 3, 1, spread=0.2, drift=0.1, ties=True, params=TOP_K),
    "windows-V256": VerifyCase("maximal", 256, 6, windows=(6, 2, 5, 1), drift=0.1),
    "windows-tiled-guided": VerifyCase("sjd", 9000, 3, 1, params=GUIDED, windows=(2, 3)),
    **{
        f"windows-{init}": VerifyCase("gumbel", 50, 9, 1, init=init, schedule=LINES, windows=(2, 9, 4), drift=0.1)
        for init in INITS[1:]
    },
    "redrafted": VerifyCase("maximal", 256, 5, 2, params=GUIDED_TOP_K, drift=0.1, redrafted=0.6),
    "redrafted-tiled-forced": VerifyCase(
        "sjd", 9000, 3, 1, schedule=LINES, dtype=torch.bfloat16, windows=(3, 2), redrafted=1.0
    ),
    "tree-2x2": VerifyCase("maximal", 7, 3, tree=(2, 2), drift=0.3),
    "tree-3x3-topk": VerifyCase("gumbel", 256, 4, 1, tree=(3, 3), params=GUIDED_TOP_K, dtype=torch.bfloat16),
    "tree-4x2-tiled": VerifyCase("sjd", 9000, 3, 1, tree=(4, 2), params=TOP_K, drift=2.0),
    "tree-3x3-forced": VerifyCase("maximal", 50, 5, 1, tree=(3, 3), schedule=LINES, ties=True),
    "tree-3x3-bad-numbers": VerifyCase("maximal", 50, 4, 1, tree=(3, 3), bad=0.2),
    "most-accepted": VerifyCase("maximal", 256, 6, drift=0.1, most_accepted=1),
    "most-accepted-forced": VerifyCase("sjd", 256, 6, schedule=LINES, params=TOP_K, drift=0.0, most_accepted=0),
    "strided": VerifyCase("maximal", 256, 3, 1, params=GUIDED, strided=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_decision_equals_the_reference(case):
    passes = 3 if case.vocab_size < 9000 else 2  # the third reads laws where the first wrote them
    assert_same_decisions(case.run(reference.verify, passes), case.run(verify, passes, DEVICE))


def test_a_broken_kernel_would_be_noticed(monkeypatch):
    """The comparison has teeth: another word for the recovered token gives another image."""
    case = VerifyCase("sjd", 256, 4, drift=1.0)
    expected = case.run(reference.verify)
    words = reference.philox.draw_words
    monkeypatch.setattr(reference.philox, "draw_words", lambda *arguments: words(*arguments)[[0, 1, 0, 3]])
    with pytest.raises(AssertionError, match="tokens"):
        assert_same_decisions(expected, case.run(reference.verify))


@pytest.mark.parametrize("tile", [256, 1024])
def test_tiles_do_not_change_decisions(tile, monkeypatch):
    """Sums are of integers: neither tiles, nor the number of warps, which orders them, can matter."""
    case = VerifyCase("maximal", 1000, 2, 1, params=GUIDED_TOP_K, drift=0.2)
    monkeypatch.setattr(launch, "LAUNCHES", (launch.Launch("tiny", None, tile, 4),))
    assert_same_decisions(case.run(reference.verify), case.run(verify, device=DEVICE))


@pytest.mark.parametrize("method", ["maximal", "exact"])
def test_a_sequence_decides_the_same_in_any_slot_of_any_batch(method):
    case = VerifyCase(method, 256, 3, 3, params=TOP_K, drift=0.2)
    batch = case.run(verify, device=DEVICE)
    for slot in range(3):
        alone = replace(case, batch_size=1, first_seed=slot).run(verify, device=DEVICE)
        for whole, one in zip(batch, alone, strict=True):
            assert all(torch.equal(whole[name][slot : slot + 1], one[name]) for name in one)


def test_the_padding_of_the_window_does_not_matter(monkeypatch):
    """The window is padded to a power of two in registers; here to four times as much."""
    case = VerifyCase("maximal", 256, 3, 1, init="above-repeat", drift=0.1)
    constants = launch.constants
    monkeypatch.setattr(launch, "constants", lambda *a: (c := constants(*a)) | {"WINDOW_BLOCK": 4 * c["WINDOW_BLOCK"]})
    assert_same_decisions(case.run(reference.verify), case.run(verify, device=DEVICE))
