"""T1 where a drafter draws drafts anew between passes, from laws of its own.

V = T = 4 as in test_exactness.py; N = 100,000 for each case, a G-test at 1e-5 each. The drafter knows nothing of the
model: it has a random table of the token to the left, which by then may be a draft that it has just drawn.
"""

import pytest
import torch

from sjd_engine import JacobiDecoder, SamplingParams, Schedule, ops
from sjd_engine.drafting import RowAbove
from sjd_engine.errors import CheckpointError
from sjd_engine.models.neighbours import FILE, load_neighbours
from sjd_engine.neighbours import ABOVE, LEFT, Neighbours, NeighbourTables
from sjd_engine.testing import TableModel, decode, g_test, outcome_counts

VOCAB = TOKENS = 4
COUNT = 100_000
LAWS = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) ** 2
LAWS[range(VOCAB), (1, 0, 3, 2)] = 1.0


class Table:
    """Draws the drafts from left to right; `chosen` says which of a row [B, 1]."""

    def __init__(self, chosen=lambda drafts, row: drafts.positions[:, row : row + 1] % 2 == 0):
        self.chosen = chosen

    def __call__(self, drafts):
        for row in range(drafts.num_drafts):
            left = drafts.tokens(drafts.positions[:, row : row + 1] - 1)
            drafts.redraw(row, LAWS[left.clamp_min(0)], self.chosen(drafts, row))


SQUARE, FORCED = Schedule(2, 2), Schedule(1, 2, {0: 1, 2: 3})
# Images whose rows are three positions apart or more, so that a window of two has lost the row above.
APART = {"lines": Schedule(2, 2, {2: 1}), "wide": Schedule(2, 3)}


def everywhere(drafts, row):
    return torch.ones_like(drafts.entered[:, row : row + 1])


def entered(drafts, row):
    return drafts.entered[:, row : row + 1]


def p_value(method, drafter=None, *, window=TOKENS, params=None, schedule=SQUARE, init="random"):
    model = TableModel(VOCAB, schedule.num_tokens, seed=7, spread=1.5)
    decoder = JacobiDecoder(
        batch_size=COUNT,
        num_tokens=schedule.num_tokens,
        vocab_size=VOCAB,
        window_size=window,
        method=method,
        init=init,
        params=params,
        schedule=schedule,
        seeds=range(COUNT),
        drafter=drafter,
    )
    assert init == "random" or isinstance(decoder._drafter, RowAbove | Neighbours)
    law = model.joint(decoder)
    counts = outcome_counts(decode(model, decoder), VOCAB)
    assert not decoder._state.zero_draft_prob.any(), "a draft outside its own law"
    return g_test(counts, law)


@pytest.mark.parametrize("chosen", [everywhere, entered], ids=["everywhere", "entered"])
@pytest.mark.parametrize("window", [2, TOKENS])
@pytest.mark.parametrize("method", ["sjd", "maximal", "gumbel", "exact"])
def test_drafts_of_any_law_leave_the_law_of_images(method, window, chosen):
    assert p_value(method, Table(chosen), window=window) > 1e-5


@pytest.mark.parametrize("method", ["maximal", "gumbel"])
def test_some_drafts_of_any_law_with_top_k_and_forced_tokens(method):
    assert p_value(method, Table(), params=SamplingParams(top_k=3), schedule=FORCED) > 1e-5


@pytest.mark.parametrize("schedule", APART.values(), ids=APART)
@pytest.mark.parametrize("method", ["sjd", "maximal", "gumbel", "exact"])
def test_the_remembered_row_above_leaves_the_law_of_images(method, schedule):
    warping = {"params": SamplingParams(top_k=3)} if schedule.forced else {}
    assert p_value(method, init="above-law", window=2, schedule=schedule, **warping) > 1e-5


ENTERING = pytest.mark.parametrize(
    ("schedule", "window"), [(SQUARE, TOKENS), (APART["lines"], 2)], ids=["square-4", "lines-2"]
)


@ENTERING
@pytest.mark.parametrize("method", ["sjd", "maximal", "gumbel", "exact"])
def test_a_blend_with_the_uniform_law_leaves_the_law_of_images(method, schedule, window):
    warping = {"params": SamplingParams(top_k=3)} if schedule.forced else {}
    assert p_value(method, init="above-blend", window=window, schedule=schedule, **warping) > 1e-5


TABLES = NeighbourTables.fit(torch.randint(VOCAB, (3, 4, 4), generator=torch.Generator().manual_seed(2)), VOCAB)


@ENTERING
@pytest.mark.parametrize("method", ["sjd", "maximal", "gumbel", "exact"])
def test_tables_of_neighbours_leave_the_law_of_images(method, schedule, window):
    assert p_value(method, Neighbours(TABLES), init="neighbours", window=window, schedule=schedule) > 1e-5


def test_a_table_says_what_stands_beside_a_code_and_shares_the_rest():
    images = torch.tensor([[[0, 1, 0], [1, 0, 1], [0, 1, 2]]])
    tables = NeighbourTables.fit(images, 5)
    prior = (torch.tensor([4.0, 4, 1, 0, 0]) + 1) / 14
    torch.testing.assert_close(tables.prior, prior)
    # Behind 1 stand 0, 0 and 2; five pseudo-counts as the prior has them.
    behind_one = (torch.tensor([2.0, 0, 1, 0, 0]) + 5 * prior) / 8
    torch.testing.assert_close(tables.factor(LEFT, torch.tensor(1)) * prior, behind_one)
    below_zero = (torch.tensor([0.0, 3, 0, 0, 0]) + 5 * prior) / 8
    torch.testing.assert_close(tables.factor(ABOVE, torch.tensor(0)) * prior, below_zero)
    both = behind_one * below_zero / prior
    torch.testing.assert_close(tables.weights(torch.tensor([1]), torch.tensor([0])), (both / both.max())[None])
    alone = tables.weights(torch.tensor([-1]), torch.tensor([-1]))
    torch.testing.assert_close(alone, (prior / prior.max())[None])


def test_tables_that_are_read_are_those_that_were_written(tmp_path):
    assert load_neighbours(tmp_path, VOCAB) is None
    TABLES.save(tmp_path / FILE)
    read = load_neighbours(tmp_path, VOCAB)
    assert all(torch.equal(tensor, vars(TABLES)[name]) for name, tensor in vars(read).items())
    with pytest.raises(CheckpointError, match=r"prior must be \[5\], got \[4\]"):
        load_neighbours(tmp_path, VOCAB + 1)


@pytest.mark.parametrize(
    "images", [torch.zeros(0, 2, 2).long(), torch.full((1, 2, 2), VOCAB), torch.zeros(2, 2).long()]
)
def test_tables_are_fitted_to_codes_of_the_model(images):
    with pytest.raises(ValueError, match="fit: "):
        NeighbourTables.fit(images, VOCAB)


def test_a_law_that_was_not_drawn_from_fails(monkeypatch):
    """What is stored is the table before it is blended with the uniform law, what is drawn from is the blend."""
    redraft = ops.redraft

    def blended(state, grid, seeds, row, weights, *where):
        redraft(state, grid, seeds, row, (weights + 1) / 2, *where)
        rows = slice(row, row + weights.shape[1])
        state.drafted[:, rows] = weights
        state.drafted_scale[:, rows] = 1 / weights.sum(-1)

    monkeypatch.setattr(ops, "redraft", blended)
    assert p_value("maximal", Table(everywhere)) < 1e-20


def test_a_choice_that_looks_at_the_token_it_replaces_fails():
    """Rule C2 broken: only drafts of token 0 are drawn anew, so those that are kept follow another law than theirs."""

    def zeros(drafts, row):
        return drafts.tokens(drafts.positions[:, row : row + 1]) == 0

    assert p_value("maximal", Table(zeros)) < 1e-20


@pytest.fixture
def wrong_laws(monkeypatch):
    """What is stored of a remembered law is sharper than what is drawn from."""
    redraft = ops.redraft

    def sharper(state, *arguments):
        redraft(state, *arguments)
        state.drafted.copy_(state.drafted**2)
        state.drafted_scale.copy_(1 / state.drafted.sum(-1))

    monkeypatch.setattr(ops, "redraft", sharper)


@pytest.mark.usefixtures("wrong_laws")
@pytest.mark.parametrize(
    ("init", "drafter"), [("above-law", None), ("above-blend", None), ("neighbours", Neighbours(TABLES))]
)
def test_a_law_of_entering_drafts_that_was_not_drawn_from_fails(init, drafter):
    assert p_value("maximal", drafter, init=init, window=2, schedule=APART["wide"]) < 1e-20


def test_the_remembered_row_goes_on_where_it_stopped():
    model = TableModel(VOCAB, 6, seed=7, spread=1.5)
    setup = {"batch_size": 500, "num_tokens": 6, "vocab_size": VOCAB, "window_size": 2, "schedule": APART["wide"]}
    tokens = []
    for stops in (False, True):
        decoder = JacobiDecoder(**setup, seeds=range(500), init="above-law")
        cache = model.new_cache(500)
        while not decoder.done:
            if stops:
                saved = decoder.state_dict()
                decoder = JacobiDecoder(**setup, seeds=range(500), init="above-law")
                decoder.load_state_dict(saved)
            ids, positions = decoder.window()
            decoder.verify(model.forward(ids, positions, cache))
        tokens.append(decoder.token_ids)
    assert torch.equal(*tokens)


def test_an_image_with_a_remembered_row_is_the_same_alone_and_in_a_batch(engine):
    arguments = {"init": "above-law", "window_size": 12, "output_type": "codes"}
    together = engine.generate(["a red apple", "a blue car"], seed=3, **arguments).token_ids
    alone = engine.generate("a blue car", seed=4, **arguments).token_ids
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("init", ["above-law", "above-blend"])
def test_laws_of_the_row_above_bring_their_own_drafter(init):
    with pytest.raises(ValueError, match="drafter: expected None"):
        p_value("maximal", Table(), init=init)


def test_neighbours_need_tables(engine, monkeypatch):
    with pytest.raises(ValueError, match=r"drafter: init 'neighbours' needs one"):
        p_value("maximal", init="neighbours")
    monkeypatch.setattr(engine.model, "neighbour_tables", None)
    with pytest.raises(
        ValueError,
        match=r"init: neighbours draws from tables, which emoji has none of: .* \(`sjd fit-drafts` makes it\)",
    ):
        engine.generate("a cat", init="neighbours")
