"""`window_size="auto"`: what it learns, what it chooses, and what it tells."""

import pytest

from sjd_engine.auto_window import (
    CANDIDATES,
    MEASURED,
    PASSES,
    START,
    AutoWindow,
    History,
    PassCosts,
    line,
    times_as_many,
)
from sjd_engine.methods import METHODS

MAXIMAL = list(zip(CANDIDATES, PASSES["maximal"], strict=True))
QUIET = {"output_type": "codes", "progress": False}


def passes_of_a_token(window: int, times: float) -> float:
    """Of an image that obeys the formula."""
    return min(1.0, max(times * line(MAXIMAL, window), 1 / window))


class TestCosts:
    def test_lines_between_and_beyond(self):
        costs = PassCosts()
        costs.measure(2, (4, 16), lambda window: lambda: 10.0 + window)
        assert [costs(n) for n in (8, 20, 32, 64)] == [14.0, 20.0, 26.0, 42.0]

    def test_a_size_is_timed_once(self):
        costs, timed = PassCosts(), []
        for count in (2, 8, 2, 4):
            costs.measure(count, (4, 16, 64), lambda window, n=count: timed.append((n, window)) or (lambda: 1.0))
        assert timed == [(2, 4), (2, 16), (2, 64), (8, 64)]

    def test_a_slow_moment_falls_on_all_or_does_not_count(self):
        costs, clock = PassCosts(), iter([1.0, 2.0] * 2 + [3.0, 6.0] + [1.0, 9.0] + [1.0, 2.0] * 9)
        costs.measure(1, (4, 16), lambda window: lambda: next(clock) / 100)
        assert (costs(4), costs(16)) == pytest.approx((0.01, 0.02))
        assert len(list(clock)) == 16, "five rounds"

    def test_a_second_is_enough(self):
        costs, clock = PassCosts(), iter([0.4, 0.4, 0.2, 0.2, 0.3])
        costs.measure(1, (4, 16), lambda window: lambda: next(clock))
        assert (costs(4), costs(16)) == pytest.approx((0.2, 0.2)), "the first round of a shape is slow"
        assert list(clock) == [0.3]

    def test_a_larger_pass_takes_no_less(self):
        costs = PassCosts()
        costs.measure(1, (4, 16, 64), lambda window: lambda: {4: 3.0, 16: 1.0, 64: 5.0}[window])
        assert [costs(n) for n in (4, 10, 16, 64)] == [3.0, 3.0, 3.0, 5.0]


class TestTimes:
    def test_before_there_is_history_it_is_the_bundled_model(self):
        assert times_as_many(MAXIMAL, [History((), 0, 256)]) == 1

    @pytest.mark.parametrize("times", [0.5, 0.9, 1.8])
    @pytest.mark.parametrize("window", [8, 32])
    def test_history_outweighs_the_prior(self, times, window):
        num_passes = START + round(4000 * passes_of_a_token(window, times))
        assert times_as_many(MAXIMAL, [History([window] * num_passes, 4000, 1000)]) == pytest.approx(times, rel=0.05)

    def test_passes_of_one_token_tell_nothing(self):
        """Hundreds of them before and after a few of 8."""
        windows = [1] * 300 + [8] * (START + 40) + [1] * 300
        few = times_as_many(MAXIMAL, [History(windows[300:-300], 100, 1000)])
        assert times_as_many(MAXIMAL, [History(windows, 700, 400)]) == pytest.approx(few)


def chosen(times: float, seconds, *, first: int = 16, num_tokens: int = 2000, largest: int = 128) -> list[int]:
    """The windows of an image that obeys the formula."""
    costs, windows, committed = PassCosts(), [], -START / passes_of_a_token(first, times) + START
    policy, window = AutoWindow("maximal", largest, costs), first
    policy.measure(1, lambda window: lambda: seconds(window))
    while committed < num_tokens:
        window = policy.choose(window, 1, [History(windows, max(0, int(committed)), num_tokens - int(committed))])
        windows.append(window)
        committed += 1 / passes_of_a_token(window, times)
    return windows


SECONDS = {
    "a pass costs the same": lambda window: 1.0,
    "a constant and a line": lambda window: 7.0 + 0.2 * window,
    "a token costs the same": lambda window: 0.1 * window,
    "a roofline": lambda window: max(1.0, window / 32),
}


class TestChoice:
    @pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("seconds", SECONDS.values(), ids=SECONDS)
    def test_it_comes_to_the_fastest_window(self, seconds, times):
        costs = PassCosts()
        costs.measure(1, MEASURED, lambda window: lambda: seconds(window))
        of_a_token = {window: costs(window) * passes_of_a_token(window, times) for window in CANDIDATES}
        windows = chosen(times, seconds)
        assert of_a_token[windows[len(windows) // 2]] < 1.05 * min(of_a_token.values())

    def test_a_small_gain_is_not_worth_a_change(self):
        def seconds(window: int) -> float:
            """Windows from 8 on differ by 1.5 %, smaller ones cost more."""
            return {1: 1.2, 4: 1.2, 16: 0.985}.get(window, 1) / passes_of_a_token(window, 1.0)

        flat = chosen(1.0, seconds, first=12)
        assert set(flat[:100]) == {12}

    def test_it_takes_one_token_a_pass_where_every_token_costs_the_same(self):
        """And stays there, though passes of one token say nothing of how hard the images are."""
        assert set(chosen(1.0, lambda window: window)[1:]) == {1}

    def test_the_window_shrinks_with_the_rest_of_the_image(self):
        windows = chosen(1.0, SECONDS["a constant and a line"], num_tokens=256)
        assert windows[-1] < windows[len(windows) // 2]

    def test_no_window_is_larger_than_asked(self):
        assert max(chosen(1.0, SECONDS["a pass costs the same"], largest=24)) == 24
        assert set(chosen(1.0, SECONDS["a pass costs the same"], first=3, largest=3, num_tokens=50)) == {3}


def test_what_windows_are_told(engine):
    fixed = engine.generate("a cat", window_size=20, **QUIET).stats[0]
    assert fixed.window_sizes == [20] * fixed.nfe
    auto = engine.generate("a cat", **QUIET).stats[0]
    assert set(auto.window_sizes) <= set(CANDIDATES) | {engine.model.defaults.window_size}
    assert max(auto.window_sizes) <= engine.model.defaults.max_window_size


def test_every_refresh_rule_has_its_passes():
    assert {method.refresh for method in METHODS.values()} == set(PASSES)
    for passes in PASSES.values():
        assert len(passes) == len(CANDIDATES)
        assert sorted(passes, reverse=True) == list(passes), "a larger window needs no more"
