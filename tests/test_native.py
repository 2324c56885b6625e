"""The compiled verify equals `reference.verify` bit for bit, and both draw from the laws they should."""

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sjd_engine import JacobiDecoder, SamplingParams, Schedule, native
from sjd_engine.kernels import arithmetic, philox, reference
from sjd_engine.kernels.state import Grid, WindowState
from sjd_engine.methods import INITS
from sjd_engine.testing import FUSED, VerifyCase, assert_same_decisions, g_test

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILTERS = {
    "plain": SamplingParams(),
    "guided-k": SamplingParams(guidance_scale=3.0, top_k=50),
    "hot-p": SamplingParams(temperature=1.4, top_p=0.9),
    "guided-cold-k-p": SamplingParams(guidance_scale=2.0, temperature=0.7, top_k=20, top_p=0.8),
}
LINE_BREAKS = Schedule.with_line_breaks(2, 3, token=2000, end_tokens=[2001])

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


def assert_equal(case: VerifyCase, spoil: Callable[[Tensor, int], Tensor] = lambda logits, number: logits) -> None:
    """Whole images by both implementations; `spoil` turns the logits of the pass `number` into those that both read."""

    def spoiled(op):
        numbers = count()
        return lambda logits, *args, **words: op(spoil(logits, next(numbers)), *args, **words)

    passes = case.schedule.num_tokens  # every pass commits a token
    expected, got = (case.run(spoiled(op), passes) for op in (reference.verify, native.verify))
    assert_same_decisions(expected, got)
    assert (got[-1]["num_committed"] == passes).all()


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("filters", FILTERS)
def test_equals_the_reference_over_whole_images(method, init, filters):
    i = list(FILTERS).index(filters)
    case = VerifyCase(
        method,
        vocab_size=(7, 256, 1000)[i % 3],
        window_size=(3, 5, 6, 13)[i],
        init=init,
        params=FILTERS[filters],
        schedule=LINE_BREAKS if i % 2 else Schedule(2, 4),
        dtype=DTYPES[i % 3],
        ties=i >= 2,
        first_seed=i,
    )
    assert_equal(case)


TREES = {
    "2x2-shortest-chain": VerifyCase("maximal", 7, 2, tree=(2, 2)),
    "3x3-guided-topk": VerifyCase("gumbel", 256, 5, tree=(3, 3), params=FILTERS["guided-k"], dtype=torch.bfloat16),
    "4x2-topp": VerifyCase("sjd", 1000, 6, tree=(4, 2), params=FILTERS["hot-p"]),
    "5x3-bad-numbers": VerifyCase("maximal", 50, 6, tree=(5, 3), bad=0.2),
    "3x4-forced-ties": VerifyCase("maximal", 50, 6, tree=(3, 4), ties=True, schedule=LINE_BREAKS),
    "4x2-fewer-tokens-than-candidates": VerifyCase("maximal", 1500, 8, tree=(4, 2), params=SamplingParams(top_k=3)),
    "3x3-windows": VerifyCase("maximal", 40, 9, tree=(3, 3), windows=(9, 4, 6)),
    "3x3-redrafted": VerifyCase("maximal", 40, 6, tree=(3, 3), redrafted=0.3),
    "3x3-sampled-neighbours": VerifyCase("maximal", 8192, 5, tree=(3, 3), init="left-sample", schedule=Schedule(2, 4)),
}


@pytest.mark.parametrize("case", TREES.values(), ids=TREES)
def test_equals_the_reference_with_a_tree(case):
    assert_equal(case)


def test_trees_leave_the_chain():
    """The cases above would prove little if no sibling were ever accepted."""
    passes = [answer for case in TREES.values() for answer in case.run(native.verify, 6)]
    left = [(a["accepted_slots"] > 1 + torch.arange(a["accepted_slots"].shape[1])).any() for a in passes]
    assert sum(left) > 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "vocab_size", "window_size"), [("maximal", 8192, 5), ("exact", 65536, 3)])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_equals_the_reference_on_large_vocabularies(method, vocab_size, window_size, dtype, top_p):
    params = SamplingParams(guidance_scale=3.0, top_k=2000, top_p=top_p)
    case = VerifyCase(
        method, vocab_size, window_size, 1, init="left-sample", params=params, schedule=Schedule.line(4), dtype=dtype
    )
    assert_equal(case)


EXTREME = {
    "nan": lambda x: x.fill_(float("nan")),
    "infinite": lambda x: x.fill_(float("inf")),
    "minus infinite": lambda x: x.fill_(float("-inf")),
    "some nan": lambda x: x[..., ::3].fill_(float("nan")),
    "some infinite": lambda x: x[..., 1::2].fill_(float("inf")),
    "few finite": lambda x: x[..., 4:].fill_(float("-inf")),
    "one-hot": lambda x: x.fill_(-60.0)[..., 5].fill_(60.0),
    "huge": lambda x: x.mul_(1e4),
    "huge and tiny": lambda x: x.fill_(-3e38)[..., ::2].fill_(3e38),
    "subnormal": lambda x: x.mul_(1e-41),
    "equal": lambda x: x.zero_(),
    "negative zeros": lambda x: x.sign_().mul_(0.0),
}


@pytest.mark.parametrize("kind", EXTREME)
@pytest.mark.parametrize("method", ["sjd", "sjd++", "maximal", "gumbel", "exact", "jacobi"])
def test_equals_the_reference_on_extreme_rows(method, kind):
    def spoil(logits: Tensor, number: int) -> Tensor:
        EXTREME[kind](logits[..., 1::2, :])  # every second row, so that good laws meet bad ones
        return logits

    for i, params in enumerate(FILTERS.values()):
        init = ("left-sample", "left-repeat")[i % 2]
        case = VerifyCase(method, 30, 4, 1, init=init, params=params, schedule=Schedule.line(6), first_seed=i)
        assert_equal(case, spoil)


@pytest.mark.parametrize("method", FUSED)
def test_equals_the_reference_with_scattered_bad_logits(method):
    for dtype in DTYPES:
        assert_equal(VerifyCase(method, 50, 6, params=FILTERS["guided-cold-k-p"], dtype=dtype, bad=0.2))


@pytest.mark.parametrize("method", ["sjd", "maximal", "gumbel"])
def test_equals_the_reference_where_target_and_draft_share_no_token(method):
    def spoil(logits: Tensor, number: int) -> Tensor:
        logits[..., number % 2 :: 2] = float("-inf")
        return logits

    assert_equal(VerifyCase(method, 40, 6, dtype=torch.bfloat16), spoil)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_may_differ_from_pass_to_pass(dtype):
    def spoil(logits: Tensor, number: int) -> Tensor:
        if number % 2:
            return logits.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
        return torch.stack((logits, logits), -1)[..., 0]

    assert_equal(VerifyCase("maximal", 300, 4, params=FILTERS["guided-cold-k-p"], dtype=dtype), spoil)


def test_forced_tokens_inside_a_row():
    """The left neighbour of an entering draft may be a forced position, whose law is then read after all."""
    schedule = Schedule(2, 8, forced={3: 99, 6: 98, 12: 97})
    for init in INITS:
        assert_equal(VerifyCase("maximal", 20, 4, batch_size=4, init=init, schedule=schedule))


def test_the_number_of_threads_changes_nothing():
    params = SamplingParams(guidance_scale=3.0, top_k=500, top_p=0.95)
    case = VerifyCase("maximal", 8192, 12, params=params, dtype=torch.bfloat16, drift=0.1)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            runs.append(case.run(native.verify))
    finally:
        torch.set_num_threads(threads)
    assert_same_decisions(runs[0], runs[1])
    assert_same_decisions(runs[0], runs[2])


def test_a_child_of_fork_makes_its_own_threads():
    code = """if True:
        import os, torch
        from sjd_engine import native
        from sjd_engine.testing import VerifyCase
        torch.set_num_threads(1)
        torch.get_num_threads = lambda: 2  # of the op alone: those of torch do not survive a fork
        case = VerifyCase("maximal", 8192, 12)
        expected = case.run(native.verify)[-1]["tokens"]
        child = os.fork()
        if child == 0:
            os._exit(int(not torch.equal(case.run(native.verify)[-1]["tokens"], expected)))
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize("init", INITS)
def test_windows_may_change_from_pass_to_pass(method, init):
    for params, windows in ((FILTERS["plain"], (4, 9, 1, 2)), (FILTERS["guided-cold-k-p"], (7, 3))):
        assert_equal(
            VerifyCase(method, 40, max(windows), init=init, params=params, schedule=LINE_BREAKS, windows=windows)
        )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_the_reference_on_random_shapes(data):
    def pick(*values):
        return data.draw(st.sampled_from(values))

    def integer(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    vocab_size, rows, cols, window = integer(2, 600), integer(1, 4), integer(1, 6), integer(1, 20)
    case = VerifyCase(
        pick(*FUSED),
        vocab_size,
        window_size=window,
        windows=pick((), (window, integer(1, window)), (1, window, integer(1, window))),
        batch_size=integer(1, 3),
        init=pick(*INITS),
        params=SamplingParams(
            guidance_scale=pick(1.0, 1.5, 4.0),
            temperature=pick(1.0, 0.3, 1.7),
            top_k=integer(0, vocab_size),
            top_p=pick(1.0, 0.999, 0.7, 0.1, 1e-6),
        ),
        schedule=pick(Schedule.with_line_breaks(rows, cols, token=vocab_size), Schedule(rows, cols)),
        dtype=pick(*DTYPES),
        spread=pick(0.1, 2.0, 30.0),
        drift=pick(0.0, 0.1, 2.0),
        bad=pick(0.0, 0.0, 0.1),
        ties=pick(False, True),
        strided=pick(False, True),
        first_seed=integer(0, 1000),
        redrafted=pick(0.0, 0.5, 1.0),
    )
    assert_equal(case)


# ------------------------------------------------------------------------------------------------------ distributions

NUM_DRAWS = 1_000_000
TARGET = torch.tensor([1.5, -3.0, 1.2, -3.0, 0.9, -3.0, -2.0, -2.0])  # rejects 6 of 10 uniform drafts
VOCAB = len(TARGET)


def first_pass(op, num_sequences: int, first_seed: int = 0) -> tuple[Tensor, Tensor]:
    """One pass of "sjd" over a window of 2 that starts with a uniform draft: (rejected [B], tokens [B, 2])."""
    seeds = torch.arange(first_seed, first_seed + num_sequences)
    state = WindowState.new(num_sequences, 2, 2, "cpu")
    grid = Grid(None, torch.zeros(2, dtype=torch.int64), torch.full((2,), -1), 2)
    reference.start(state, grid, window_size=2, init="random", seeds=seeds, vocab_size=VOCAB)
    logits = TARGET.expand(num_sequences, 2, VOCAB)
    result = op(logits, state, grid, window_size=2, accept="ratio", refresh="fresh", init="random", seeds=seeds)
    return result.num_accepted == 0, state.tokens[:, 1:3]


def p_values(op, num_draws: int) -> dict[str, float]:
    """G-tests of residual, fresh and committed draws of `first_pass`, from at least `num_draws` rejections."""
    target = TARGET.double().softmax(0)
    residual = (target - 1 / VOCAB).clamp_min(0)
    laws = {"residual": residual / residual.sum(), "fresh": target, "committed": target}
    counts = {name: torch.zeros(VOCAB, dtype=torch.int64) for name in laws}
    for seed in count(step=250_000):
        rejected, tokens = first_pass(op, 250_000, seed)
        draws = {"residual": tokens[rejected, 0], "fresh": tokens[rejected, 1], "committed": tokens[:, 0]}
        for name, drawn in draws.items():
            counts[name] += torch.bincount(drawn, minlength=VOCAB)
        if counts["residual"].sum() >= num_draws:
            break
    return {name: g_test(counts[name], law) for name, law in laws.items()}


@pytest.mark.parametrize("op", [native.verify, reference.verify], ids=["native", "reference"])
def test_residual_and_fresh_draws_follow_their_laws(op):
    for name, p_value in p_values(op, NUM_DRAWS).items():
        assert p_value > 1e-6, name


@pytest.mark.parametrize(
    ("word", "reused", "biased"),
    [
        ("RESIDUAL", philox.ACCEPT, "residual"),
        ("RESIDUAL", philox.INIT, "residual"),
        ("ACCEPT", philox.INIT, "committed"),
    ],
)
def test_a_reused_uniform_is_found(monkeypatch, word, reused, biased):
    """Negative control: two decisions share a random word."""
    monkeypatch.setattr(philox, word, reused)
    assert p_values(reference.verify, 100_000)[biased] < 1e-9


SECOND_DRAFT, SECOND_TARGET = torch.tensor([0.4, 0.5, 0.1]), torch.tensor([0.02, 0.58, 0.4])


def second_pass_of_gumbel(op, num_sequences: int) -> float:
    """The G-test of position 1, drafted from SECOND_DRAFT with Gumbel noise, then tested against SECOND_TARGET."""
    seeds = torch.arange(num_sequences)
    state = WindowState.new(num_sequences, 3, 3, "cpu")
    grid = Grid(None, torch.zeros(3, dtype=torch.int64), torch.full((3,), -1), 3)
    reference.start(state, grid, window_size=3, init="random", seeds=seeds, vocab_size=3)
    first, second = (law.log().repeat(num_sequences, 3, 1) for law in (SECOND_DRAFT, SECOND_TARGET))
    first[torch.arange(num_sequences), 0, state.tokens[:, 1]] = float("-inf")  # rejected, so position 1 is drawn anew
    for logits in (first, second):
        op(logits, state, grid, window_size=3, accept="ratio", refresh="gumbel", init="random", seeds=seeds)
    return g_test(torch.bincount(state.tokens[:, 2], minlength=3), SECOND_TARGET.double())


@pytest.mark.parametrize("op", [native.verify, reference.verify], ids=["native", "reference"])
def test_drafts_by_gumbel_noise_leave_the_law_unchanged(op):
    assert second_pass_of_gumbel(op, 100_000) > 1e-6


def test_a_reused_gumbel_vector_is_found(monkeypatch):
    """Negative control: the residual is drawn with the noise that made the draft."""
    num_sequences = 100_000

    def draw(weights: Tensor, words: Tensor) -> Tensor:
        positions = torch.arange(1, 4).expand(num_sequences, -1)  # those of the second pass, which is looked at
        return (weights.log() + philox.gumbel_noise(torch.arange(num_sequences), positions, 3)).argmax(-1)

    monkeypatch.setattr(reference, "draw", draw)
    assert second_pass_of_gumbel(reference.verify, num_sequences) < 1e-9


# ---------------------------------------------------------------------------------------------------------- the module


def test_the_constants_are_those_of_the_reference():
    header = (ROOT / "csrc" / "arithmetic.h").read_text()

    def numbers(name: str) -> list[float]:
        text = re.search(rf"{name}(?:\[\])? = ([^;]*);", header).group(1)
        return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]

    assert numbers("kExp2") == list(arithmetic.EXP2)
    assert numbers("kLog1p") == list(arithmetic.LOG1P)
    for name, value in (("kLog2E", arithmetic.LOG2_E), ("kLn2", arithmetic.LN_2), ("kMagic", arithmetic.MAGIC)):
        assert numbers(name) == [value]
    assert numbers("kMinExponent") == [arithmetic.MIN_EXPONENT]


class TestErrors:
    def arguments(self):
        decoder = JacobiDecoder(batch_size=1, num_tokens=4, vocab_size=8, window_size=2, seeds=[0])
        words = {"window_size": 2, "accept": "ratio", "refresh": "fresh", "init": "random", "seeds": decoder._seeds}
        return [torch.zeros(1, 2, 8), decoder._state, decoder._grid], words

    def test_the_dtype_of_the_logits(self):
        args, words = self.arguments()
        args[0] = args[0].double()
        with pytest.raises(ValueError, match="verify: logits must be float32, float16 or bfloat16 on a CPU"):
            native.verify(*args, **words)

    @pytest.mark.parametrize("name", ["accept", "refresh", "init"])
    def test_an_unknown_name_lists_the_known(self, name):
        args, words = self.arguments()
        with pytest.raises(ValueError, match=f"verify_cpu: {name} must be one of .*, got 'none'"):
            native.verify(*args, **{**words, name: "none"})

    def test_a_tensor_of_another_dtype(self):
        args, words = self.arguments()
        with pytest.raises(ValueError, match=r"verify: top_k must be contiguous torch.int64"):
            native.verify(*args, **words, top_k=torch.tensor([3.0]))

    def test_reuse_needs_its_threshold(self):
        args, words = self.arguments()
        with pytest.raises(ValueError, match="reuse_threshold must be given where refresh is reuse"):
            native.verify(*args, **{**words, "refresh": "reuse"})

    def test_an_error_leaves_the_state_as_it_was(self):
        args, words = self.arguments()
        with pytest.raises(ValueError, match="init"):
            native.verify(*args, **{**words, "init": "none"})
        assert args[1].iteration.tolist() == [0]
        assert args[1].previous_logits is None


def test_what_the_doctor_asks():
    assert native.why_not() == ""
    assert native.isa() in ("x86-64-v4", "x86-64-v3", "x86-64", "compiler default")
    assert all(re.fullmatch(r"(sm|compute)_\d+", arch) for arch in native.cuda_archs())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cuda_devices: "):
            native.cuda_devices()
