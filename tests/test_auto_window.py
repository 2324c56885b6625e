"""`window_size="auto"`: what it learns, what it chooses, and what it tells."""

import pytest

from sjd_engine.auto_window import CANDIDATES, MEASURED, PRIORS, AutoWindow, History, PassCosts, passes_of_a_token
from sjd_engine.methods import METHODS

PRIOR = PRIORS["maximal"]
QUIET = {"output_type": "codes", "progress": False}


def passes_for(num_tokens: int, window: int, passes: float) -> int:
    """Of an image that obeys the formula: c passes to begin with, then u + c / W for each token."""
    return round(PRIOR.refreshes + num_tokens * (passes + PRIOR.refreshes / window))


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

    def test_the_best_of_a_few_rounds_counts(self):
        costs, clock = PassCosts(), iter([0.2, 0.4, 0.1, 0.2, 0.3, 0.2, 0.5, 0.5])
        costs.measure(1, (4, 16), lambda window: lambda: next(clock))
        assert (costs(4), costs(16)) == (0.1, 0.2)
        assert list(clock) == [0.5, 0.5], "a second is enough"

    def test_a_larger_pass_takes_no_less(self):
        costs = PassCosts()
        costs.measure(1, (4, 16, 64), lambda window: lambda: {4: 3.0, 16: 1.0, 64: 5.0}[window])
        assert [costs(n) for n in (4, 10, 16, 64)] == [3.0, 3.0, 3.0, 5.0]


class TestAcceptance:
    def test_before_there_is_history_it_is_the_prior(self):
        assert passes_of_a_token(PRIOR, [History((), 0, 256)]) == PRIOR.passes

    @pytest.mark.parametrize("passes", [0.05, 0.3])
    @pytest.mark.parametrize("window", [8, 32])
    def test_history_outweighs_the_prior(self, passes, window):
        history = History([window] * passes_for(4000, window, passes), 4000, 1000)
        assert passes_of_a_token(PRIOR, [history]) == pytest.approx(passes, rel=0.1)


def chosen(passes: float, seconds, *, first: int = 16, num_tokens: int = 2000, largest: int = 128) -> list[int]:
    """The windows of an image that obeys the formula."""
    costs, windows, committed = PassCosts(), [], -PRIOR.refreshes
    policy, window = AutoWindow("maximal", largest, costs), first
    policy.measure(1, lambda window: lambda: seconds(window))
    while committed < num_tokens:
        window = policy.choose(window, 1, [History(windows, max(0, int(committed)), num_tokens - int(committed))])
        windows.append(window)
        committed += 1 / (passes + PRIOR.refreshes / window)
    return windows


SECONDS = {
    "a pass costs the same": lambda window: 1.0,
    "a constant and a line": lambda window: 7.0 + 0.2 * window,
    "a token costs the same": lambda window: 0.1 * window,
    "a roofline": lambda window: max(1.0, window / 32),
}


class TestChoice:
    @pytest.mark.parametrize("passes", [0.04, 0.15, 0.4])
    @pytest.mark.parametrize("seconds", SECONDS.values(), ids=SECONDS)
    def test_it_comes_to_the_fastest_window(self, seconds, passes):
        costs = PassCosts()
        costs.measure(1, MEASURED, lambda window: lambda: seconds(window))
        of_a_token = {window: costs(window) * min(1, passes + PRIOR.refreshes / window) for window in CANDIDATES}
        middle = chosen(passes, seconds)[len(chosen(passes, seconds)) // 2]
        assert of_a_token[middle] < 1.08 * min(of_a_token.values())

    def test_a_small_gain_is_not_worth_a_change(self):
        flat = chosen(0.15, lambda window: 1 / min(1, 0.15 + PRIOR.refreshes / window), first=12)
        assert set(flat[:100]) == {12}

    def test_it_takes_one_token_a_pass_where_every_token_costs_the_same(self):
        """And stays there, though passes of one token say nothing of how hard the images are."""
        assert set(chosen(0.15, lambda window: window)[1:]) == {1}

    def test_the_window_shrinks_with_the_rest_of_the_image(self):
        windows = chosen(0.15, SECONDS["a constant and a line"], num_tokens=256)
        assert windows[-1] < windows[len(windows) // 2]

    def test_no_window_is_larger_than_asked(self):
        assert max(chosen(0.15, SECONDS["a pass costs the same"], largest=24)) == 24
        assert set(chosen(0.15, SECONDS["a pass costs the same"], first=3, largest=3, num_tokens=50)) == {3}


def test_what_windows_are_told(engine):
    fixed = engine.generate("a cat", window_size=20, **QUIET).stats[0]
    assert fixed.window_sizes == [20] * fixed.nfe
    auto = engine.generate("a cat", **QUIET).stats[0]
    assert set(auto.window_sizes) <= set(CANDIDATES) | {engine.model.defaults.window_size}
    assert max(auto.window_sizes) <= engine.model.defaults.max_window_size


def test_every_refresh_rule_has_a_prior():
    assert {method.refresh for method in METHODS.values()} == set(PRIORS)
