"""The frontier tree: its shape, and the law of what one row of it commits, enumerated."""

import pytest
import torch

from sjd_engine.kernels import philox, tree
from sjd_engine.kernels.arithmetic import residual
from sjd_engine.kernels.tree import Tree, try_siblings


class TestShape:
    """Of the worked example in the module."""

    TREE, WINDOW = Tree(3, 3), 5

    def test_slots(self):
        nodes = self.TREE.nodes(self.WINDOW)
        assert [level for level, _ in nodes] == [0, 1, 2, 3, 4, 1, 1, *[2] * 8]
        assert self.TREE.num_extra == 10
        assert [self.TREE.slot(level, path, self.WINDOW) for level, path in nodes] == list(range(15))

    def test_parents(self):
        assert self.TREE.parents(self.WINDOW) == [-1, 0, 1, 2, 3, 0, 0, 1, 1, 5, 5, 5, 6, 6, 6]
        children = self.TREE.children(self.WINDOW).tolist()
        assert children[0] == [1, 5, 6]
        assert children[6] == [12, 13, 14]

    def test_a_slot_sees_its_ancestors_and_itself(self):
        seen = self.TREE.window_bias(self.WINDOW) == 0
        assert seen[4].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
        assert seen[8].nonzero().flatten().tolist() == [0, 1, 8]
        assert seen[13].nonzero().flatten().tolist() == [0, 6, 13]


@pytest.fixture
def in_float64(monkeypatch):
    """Laws without the rounding of `arithmetic.normalise`; a list of those that were made."""
    made = []

    def normalise(weights):
        total = weights.sum(-1, keepdim=True)
        made.append(torch.where(total > 0, weights / total, 0.0))
        return made[-1]

    monkeypatch.setattr(tree, "normalise", normalise)
    return made


def committed_law(p, q, num_candidates, made, *, from_residual=False):
    """[V] float64: what one row commits, summed over all candidates and all that may become of them.

    from_residual: the published mistake, siblings drawn from what is left over of p, not of q.
    """
    law = torch.zeros_like(p)

    def add(candidates, chance):
        made.clear()
        first, *siblings = torch.tensor(candidates)[:, None, None]
        siblings = torch.cat(siblings, -1)[None] if siblings else torch.empty(1, 1, 0, dtype=torch.int64)
        rejected = torch.zeros(1, 1, dtype=torch.bool)
        left = try_siblings(residual(p, q)[None, None], q[None, None], first, rejected, siblings, WORDS).left_over
        p_last, q_last = (weights.flatten() for weights in made[-2:]) if made else (p, q)
        token = candidates[-1]
        odds = min(1.0, float(p_last[token] / q_last[token]))
        law[token] += chance * odds
        chance *= 1 - odds
        untried = q.index_fill(0, torch.tensor(candidates), 0)
        if len(candidates) == num_candidates or untried.sum() == 0:
            law.add_(chance * (left.flatten() / left.sum() if left.sum() > 0 else p))
            return
        drawn_from = left.flatten() if from_residual else untried
        for token in drawn_from.nonzero().flatten().tolist():
            add([*candidates, token], chance * float(drawn_from[token] / drawn_from.sum()))

    for token in q.nonzero().flatten().tolist():
        add([token], float(q[token]))
    return law


WORDS = torch.full((4, 1, 1), philox.WORD)  # the largest uniforms: the laws are looked at, not the decisions


def random_law(vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(vocab_size, generator=generator, dtype=torch.float64) ** 3
    return weights / weights.sum()


def law_pairs(vocab_size):
    """(p, q): at random, with tokens that one of them or both lack, alike, and far apart."""
    p, q = random_law(vocab_size, 1), random_law(vocab_size, 2)
    holes = q.index_fill(0, torch.tensor([1, 3]), 0)
    peaked = torch.tensor([1 - 1e-9] + [1e-9 / (vocab_size - 1)] * (vocab_size - 1), dtype=torch.float64)
    return [(p, q), (p, holes / holes.sum()), (holes / holes.sum(), q), (p, p), (p, peaked), (peaked, q)]


@pytest.mark.parametrize("num_candidates", [1, 2, 3, 4])
def test_a_row_commits_the_target_law(num_candidates, in_float64):
    for p, q in law_pairs(5):
        law = committed_law(p, q, num_candidates, in_float64)
        assert (law - p).abs().max() < 1e-12


@pytest.mark.parametrize("num_candidates", [2, 3])
def test_siblings_from_the_residual_bend_it(num_candidates, in_float64):
    pairs = [(random_law(5, seed), random_law(5, seed + 1)) for seed in range(8)]
    laws = [committed_law(p, q, num_candidates, in_float64, from_residual=True) for p, q in pairs]
    assert max(0.5 * (law - p).abs().sum() for law, (p, _) in zip(laws, pairs, strict=True)) > 0.05


def test_rounding_bends_it_by_less_than_a_millionth():
    """The laws that decisions are made of, beside those without rounding."""
    p, q = (law.float()[None, None] for law in law_pairs(5)[0])
    siblings, first = torch.tensor([[[2, 4]]]), torch.tensor([[0]])
    rejected = torch.zeros(1, 1, dtype=torch.bool)
    left = try_siblings(residual(p, q), q, first, rejected, siblings, WORDS).left_over
    p, q = p.double(), q.double()
    for token in (0, 2, 4):
        p = (rest := residual(p, q)) / rest.sum()
        q = q.index_fill(-1, torch.tensor([token]), 0)
        q = q / q.sum()
    assert (left.double() / left.double().sum() - p).abs().max() < 1e-6
